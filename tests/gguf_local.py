"""Tiny GGUF files, written as llama.cpp's converter names things: a Llama of two layers with a byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch

from families import tiny_model
from tokenizers_local import byte_tokenizer

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
}


def write_gguf(
    path: Path,
    *,
    part: tuple[int, int] | None = None,
    more: dict[str, tuple[int, ...]] | None = None,
    tokenizer: bool = True,
    merges: list[str] | None = None,
) -> Path:
    """A whole file, or ``part`` (of, from 0) of several; ``more`` are shapes of tensors that no Llama has."""
    model = tiny_model("llama", vocab_size=290, tie_word_embeddings=False)
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer:
        parts = json.loads(byte_tokenizer(config.vocab_size).backend_tokenizer.to_str())["model"]
        tokens = sorted(parts["vocab"], key=parts["vocab"].__getitem__)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens + [f"<unused{n}>" for n in range(len(tokens), config.vocab_size)])
        writer.add_token_types([1] * config.vocab_size)
        writer.add_token_merges(merges or [" ".join(pair) for pair in parts["merges"]])
    tensors = {_name(name): tensor for name, tensor in model.state_dict().items()}
    if part is not None:
        writer.add_uint16("split.no", part[0])
        writer.add_uint16("split.count", part[1])
        tensors = dict(list(tensors.items())[part[0] :: part[1]])
    for name, shape in (more or {}).items():
        tensors[name] = torch.ones(shape)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _name(name: str) -> str:
    for theirs, short in _NAMES.items():
        name = name.replace(theirs, short)
    return name
