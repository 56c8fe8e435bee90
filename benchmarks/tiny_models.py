"""Tiny configs of every causal LM type of transformers: sizes by the name of the field, and what a type needs beside.

``small_config(name)`` makes one. A name is a model type, or one of ``VARIANTS``: another kind of a type, as published.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from tiny_needs import (
    CONTEXT,
    DEFAULT,
    GENERIC,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    IMAGES,
    INNER,
    KEY_HEADS,
    LAYERS,
    NEEDS,
    VARIANTS,
    VOCAB,
    Fields,
)

EXPERT_INNER = 48


def _all(names: str, value: Any) -> Fields:
    return dict.fromkeys(names.split(), value)


# Field -> value, in whatever config it is.
SIZES: Fields = {
    **_all("vocab_size vocab_size_per_layer_input unpadded_vocab_size", VOCAB),
    **_all("hidden_size d_model n_embd emb_dim embedding_size word_embed_proj_dim input_embedding_size", HIDDEN),
    **_all("output_embedding_size embed_dim embedding_dim lru_width backbone_hidden_size", HIDDEN),
    **_all("intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim dim_ff dff d_inner ffn_hidden_size", INNER),
    **_all("feed_forward_size intermediate_size_mlp dense_intermediate_size", INNER),
    **_all("moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size", EXPERT_INNER),
    **_all("moe_shared_expert_intermediate_size expert_ffn_hidden_size", EXPERT_INNER),
    **_all("shared_experts_intermediate_size", EXPERT_INNER),
    **_all("num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers", LAYERS),
    **_all("encoder_layers num_encoder_layers", LAYERS),
    **_all("num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads", HEADS),
    **_all("attention_heads num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads", HEADS),
    **_all("num_key_value_heads swa_num_key_value_heads", KEY_HEADS),
    **_all("head_dim dim_head swa_head_dim kv_channels attention_head_size v_head_dim qk_nope_head_dim", HEAD_DIM),
    **_all("kv_lora_rank o_lora_rank", 16),
    **_all("q_lora_rank", 32),
    **_all("qk_rope_head_dim rotary_dim laurel_rank index_block_size", 8),
    **_all("index_topk", 16),  # fewer than the tokens of a walk, and no fewer than those of a generation: see there
    **_all("num_experts n_routed_experts num_local_experts moe_num_experts", 4),
    **_all("num_experts_per_tok moe_topk moe_k top_k_experts moe_top_k o_groups index_topk_blocks", 2),
    **_all("n_shared_experts num_shared_experts moe_num_shared_experts topk_group n_groups", 1),
    **_all("first_k_dense_replace num_dense_layers moe_layer_start_index", 1),
    **_all("mamba_n_heads mamba_num_heads", 8),
    **_all("mamba_d_state mamba_chunk_size chunk_size state_size ssm_state_size mamba_head_dim", 16),
    **_all("linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim query_pre_attn_scalar", 16),
    **_all("hidden_size_per_layer_input", 16),
    **_all("mamba_d_ssm", 128),
    **_all("linear_num_key_heads altup_num_inputs type_vocab_size", 2),
    **_all("linear_num_value_heads linear_num_heads index_n_heads", 4),
    **_all("max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions", CONTEXT),
    **_all("original_max_position_embeddings", CONTEXT),
    **_all("bos_token_id cls_token_id decoder_start_token_id num_mtp_layers num_nextn_predict_layers", 0),
    **_all("eos_token_id sep_token_id eod_token_id", 1),
    **_all("pad_token_id", 2),
    **_all("mask_token_id", 3),
    **_all("decoder_vocab_size forced_eos_token_id begin_suppress_tokens", None),
    **_all("image_token_id image_token_index video_token_id audio_token_id boi_token_id eoi_token_id", 310),
    **_all("boi_token_index eoi_token_index boa_token_id eoa_token_id eoa_token_index", 310),
    **_all("vision_start_token_id vision_end_token_id", 310),
}
# Only where a type has a value by default; at most this.
LIMITS: Fields = {
    **_all("sliding_window attention_window_size local_attention window_size sliding_window_size", 8),
    **_all("attention_chunk_size local_attention_window_len", 8),
    "n_group": 2,
}
# Left out where a type has none by default.
OPTIONAL = _all(
    "n_inner num_kv_heads attention_hidden_size q_lora_rank lru_width num_mtp_layers d_head v_head_dim embedding_dim "
    "unpadded_vocab_size moe_latent_size",
    True,
)
DECODERS_OF_PAIRS = _all(
    "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet trocr whisper",
    True,
)
FORMER_ENCODERS = _all(
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod reformer",
    True,
)


def small_config(name: str) -> PreTrainedConfig:
    """Makes the config of a model type or variant: about four layers of width 64 and 320 tokens."""
    kind, differs = VARIANTS.get(name, (name, {}))
    cls: Any = CONFIG_MAPPING[kind]
    needs = NEEDS.get(kind, {}) | differs
    if needs.get("text_config") == GENERIC:
        part = cls.sub_configs["text_config"]
        needs["text_config"] = _sized(part, NEEDS.get(part.model_type, {}))
    fields = _sized(cls, needs)
    if kind in DECODERS_OF_PAIRS:
        fields |= {"is_decoder": True, "is_encoder_decoder": False, "add_cross_attention": False}
    if kind in FORMER_ENCODERS:
        fields |= {"is_decoder": True}
    return cls(**{key: value for key, value in (fields | needs).items() if value != DEFAULT})


def _sized(cls: Any, needs: Fields) -> Fields:
    """The fields of a config class that the tables have, and those of the configs in it."""
    defaults = {f.name: None if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(cls)}
    latent = "kv_lora_rank" in defaults  # one latent for all heads
    fields: Fields = {"topk_group": None} if "n_group" in defaults and defaults["n_group"] is None else {}
    for name, default in defaults.items():
        if (name in OPTIONAL and default is None) or name in fields:
            continue
        if latent and name in ("num_key_value_heads", "head_dim"):
            fields[name] = HEADS if name == "num_key_value_heads" else 8
        elif name in SIZES:
            fields[name] = SIZES[name]
        elif name in LIMITS and default is not None:
            fields[name] = min(LIMITS[name], default) if isinstance(default, int) else LIMITS[name]
    for name, part in (getattr(cls, "sub_configs", None) or {}).items():
        if name in defaults and name not in needs and dataclasses.is_dataclass(part):
            fields[name] = _part(name, part)
    return fields | needs


def _part(name: str, part: Any) -> Fields:
    if any(word in name for word in ("vision", "audio", "vq")):
        known = {field.name for field in dataclasses.fields(part)}
        return {key: value for key, value in IMAGES.items() if key in known}
    return _sized(part, NEEDS.get(getattr(part, "model_type", ""), {}))
