"""What a GGUF file says about a model beside its tensors: the config and the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from svdllm.common.errors import UnsupportedModelError

# Model types whose tensors are those of transformers -> the architecture's name in GGUF.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# Where rotary embeddings pair neighbouring features, and transformers pairs the halves of a head.
INTERLEAVED_ROTARY = ("llama",)
# Names of llama.cpp for what splits a text before merges, by what tokenizer.json has; the first that is found.
PRE_TOKENIZERS = ((r"\\p{N}{1,3}", "llama-bpe"), (r"\\p{N}|", "qwen2"), ('"Digits"', "smollm"), ("", "gpt-2"))
NORMAL, CONTROL = 1, 3  # types of tokens


def architecture_of(config: PreTrainedConfig) -> str:
    """The architecture's name in GGUF.

    Raises:
        UnsupportedModelError: this export does not know it, or it scales its rotary embeddings.
    """
    name = ARCHITECTURES.get(config.model_type)
    if name is None:
        raise UnsupportedModelError(
            f"GGUF files can be written of {', '.join(ARCHITECTURES)}, found {config.model_type}. Convert the folder "
            "with llama.cpp's convert_hf_to_gguf.py, after `svdllm export --format dense` if it has factors."
        )
    rope: Any = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise UnsupportedModelError(
            f"GGUF files can be written of models with plain rotary embeddings, found rope_type {rope['rope_type']!r}. "
            "Convert the folder with llama.cpp's convert_hf_to_gguf.py."
        )
    return name


def add_config(writer: Any, config: PreTrainedConfig, architecture: str) -> None:
    """Writes the sizes of a model under the keys from which transformers and llama.cpp read them."""
    values = config.to_dict() | {"rope_theta": (getattr(config, "rope_parameters", None) or {}).get("rope_theta")}
    if values.get("head_dim") is None:
        values["head_dim"] = config.hidden_size // config.num_attention_heads
    for key, name in GGUF_CONFIG_MAPPING[config.model_type].items():
        value = values.get("head_dim" if key == "rope.dimension_count" else name or "")
        if isinstance(value, bool) or value is None:
            continue
        is_real = isinstance(value, float) or key.startswith("rope.freq")
        add = writer.add_float32 if is_real else writer.add_uint32
        add(f"{architecture}.{key}", float(value) if is_real else int(value))


def add_tokenizer(writer: Any, folder: Path, config: PreTrainedConfig) -> None:
    """Writes a tokenizer of byte-level merges.

    Raises:
        UnsupportedModelError: the folder has no such tokenizer.
    """
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    model = content.get("model", {})
    if model.get("type") != "BPE" or '"ByteLevel"' not in json.dumps(content.get("pre_tokenizer")):
        raise UnsupportedModelError(
            f"GGUF files can be written with a tokenizer of byte-level merges (BPE in tokenizer.json), found "
            f"{model.get('type') or 'no tokenizer.json'}. Convert the folder with llama.cpp's convert_hf_to_gguf.py."
        )
    special = {token["id"]: token["content"] for token in content.get("added_tokens", ())}
    by_id = {number: token for token, number in model["vocab"].items()} | special
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(config.vocab_size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    pre = json.dumps(content["pre_tokenizer"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(next(name for part, name in PRE_TOKENIZERS if part in pre))
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if number in special else NORMAL for number in range(len(tokens))])
    writer.add_token_merges(merges)
    for add, name in (
        (writer.add_bos_token_id, "bos_token_id"),
        (writer.add_eos_token_id, "eos_token_id"),
        (writer.add_pad_token_id, "pad_token_id"),
    ):
        value = getattr(config, name, None)
        if (first := value[0] if isinstance(value, list) else value) is not None:
            add(first)
    template = folder / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))
