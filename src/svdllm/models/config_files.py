"""Reads the config of a model, and refuses what svdllm cannot work with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from svdllm.common.errors import CheckpointError, InputError, UnsupportedModelError, first_line
from svdllm.common.extras import require_extra
from svdllm.models.limits import text_config
from svdllm.models.low_rank.families import find_head
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.low_rank.lowrank import read_object
from svdllm.models.model_names import snapshot_commit
from svdllm.models.quantized_sources.methods import METHODS, Quantization, quantization_of, quantization_settings

ADAPTER_FILE = "adapter_config.json"  # of PEFT
# How names of classes end, in lower case: early conversions have LLaMAForCausalLM.
_HEADS = ("forcausallm", "lmheadmodel")


def load_config(folder: Path, name: str, *, allow_quantized: bool = False) -> PreTrainedConfig:
    """Reads the config of a model folder. Code that comes with a model is never run, and nobody is asked about it.

    Where weights are quantised in a way that svdllm dequantises when it reads them, the config is that of the dense
    model.

    Raises:
        InputError: the folder holds no model, or a PEFT adapter.
        CheckpointError: ``config.json`` is damaged.
        UnsupportedModelError: it is not a causal language model, or it is quantised in a way that cannot be
            dequantised and is not allowed.
    """
    _refuse_adapter(folder, name)
    fields = read_config(folder, name)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of any kind, by the class of the config and what is wrong in it
        own_code = fields.get("model_type") not in CONFIG_MAPPING and "auto_map" in fields
        raise UnsupportedModelError(
            f"{name} needs code of its own for its model_type {fields.get('model_type')!r}, which transformers does "
            "not have; svdllm never runs such code."
            if own_code
            else f"The config of {name} cannot be read by transformers: {first_line(error)}"
        ) from error
    LowRankInfo.of(config, name)
    require_causal_lm(config, name)
    if quantization := quantization_of(folder):
        return _dense_config(config, quantization)
    check_quantization(config, name, allow_quantized)
    return config


def _dense_config(config: PreTrainedConfig, quantization: Quantization) -> PreTrainedConfig:
    for level in (config, config.get_text_config()):
        vars(level).pop("quantization_config", None)
        level.dtype = quantization.dtype
    return config


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """Reads ``config.json``. Raises InputError where there is none, CheckpointError if it is damaged."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{name} is not a model folder: it has no config.json{_what_it_has(folder)}")
    try:
        return read_object(folder / "config.json")
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{name} cannot be read: {first_line(error)} Fetch or write it again.") from error


def _what_it_has(folder: Path) -> str:
    """Ends a sentence on a folder without a model: what else is in it, and what to do."""
    if ggufs := sorted(map(str, folder.glob("*.gguf"))):
        return f", but GGUF weights. Pass {'the file' if len(ggufs) == 1 else 'one of the files'}: {', '.join(ggufs)}."
    found = sorted(path.name for path in folder.iterdir())[:6]
    of_gguf = " Of a repository of GGUF files, download one and pass its path." if snapshot_commit(folder) else ""
    return f" (found {', '.join(found) or 'nothing'}). Expected a folder as written by save_pretrained.{of_gguf}"


def _refuse_adapter(folder: Path, name: str) -> None:
    """Raises InputError for a PEFT adapter, also beside a model: transformers loads both where PEFT is installed."""
    if not (folder / ADAPTER_FILE).is_file():
        return
    if (folder / "config.json").is_file():
        raise InputError(
            f"{name} has an adapter ({ADAPTER_FILE}) beside a model. Merge it into the model first, or remove "
            f"{ADAPTER_FILE} if it is merged already."
        )
    raise InputError(
        f"{name} is an adapter of PEFT, not a model. Merge the adapter first, and use the folder that this writes: "
        f"peft.AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload().save_pretrained('merged'), and "
        "its tokenizer beside it."
    )


def is_quantized(folder: Path) -> bool:
    """Whether the config of a folder says that its weights are quantised in a way that svdllm does not dequantise."""
    try:
        fields = read_object(folder / "config.json")
        settings, own = quantization_settings(fields), fields.get("svdllm")
        is_known = not settings or settings.get("quant_method") in METHODS
        return not is_known or bool(isinstance(own, dict) and own.get("embeddings"))
    except (OSError, ValueError):
        return False  # ``load_config`` reports it


def require_causal_lm(config: PreTrainedConfig, name: str) -> None:
    """Raises UnsupportedModelError unless the config describes a decoder-only language model, or a wrapper around one.

    transformers chooses the class by ``model_type`` alone. ``architectures`` is checked too, because a model with
    another head has no weights for the vocabulary.
    """
    info = LowRankInfo.of(config, name)
    model_type = info.base_model_type if info else config.model_type
    head = find_head(model_type)
    architectures = [config.architectures] if isinstance(config.architectures, str) else config.architectures or []
    is_decoder = head is not None and not (config.is_encoder_decoder or text_config(config).is_encoder_decoder)
    if head is not None and is_decoder:
        ends = (*_HEADS, head.name.lower())
        expected = head.cls.__name__
        if all(each != expected and not each.lower().endswith(ends) for each in architectures or [expected]):
            refuse_several_parts(config, name)
            raise UnsupportedModelError(
                f"{name} is not a causal language model: its architecture is {architectures[0]}, expected {expected}."
            )
        return
    refuse_several_parts(config, name)
    named = f" ({architectures[0]})" if architectures else ""
    raise UnsupportedModelError(
        f"{name} is not a causal language model: its model_type is {model_type!r}{named}, for which transformers "
        "has no decoder-only language model. Expected something like llama, qwen2 or gpt2."
    )


def refuse_several_parts(config: PreTrainedConfig, name: str) -> None:
    """Raises UnsupportedModelError for a larger model with a language model in it that can be compressed by itself."""
    text = config.get_text_config(decoder=True)
    is_alone = text.model_type == config.model_type or config.is_encoder_decoder or text.is_encoder_decoder
    if not is_alone and MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text.model_type, "").endswith("ForCausalLM"):
        raise UnsupportedModelError(
            f"{name} is more than a language model: its model_type is {config.model_type!r}. The language model in it, "
            f"of type {text.model_type!r}, can be compressed once it is saved alone: see docs/faq.md."
        )


def check_quantization(config: PreTrainedConfig, name: str, allowed: bool) -> None:
    """Raises UnsupportedModelError for quantised weights where they are not allowed; they can only be run."""
    info = LowRankInfo.of(config, name)
    settings = getattr(config, "quantization_config", None)
    if not settings and not (info and info.embeddings):
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", "svdllm")
    method = getattr(method, "value", method) or "unknown"
    if not allowed:
        raise UnsupportedModelError(
            f"{name} is quantised ({method}). Quantisation comes last: such a model can be run and measured, but not "
            "compressed, sliced, trained, exported or quantised again. Use the model that it was made of, or a folder "
            f"that is quantised in a way that svdllm dequantises on reading: {', '.join(METHODS)}."
        )
    if method == "torchao":
        require_extra("torchao", f"{name}, which is quantised,", extra="quantize")
