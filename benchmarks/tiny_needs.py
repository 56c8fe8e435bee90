"""What some model types need beside the general sizes of ``tiny_models``, and other kinds of a type, as published."""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]
HIDDEN, HEADS, KEY_HEADS, HEAD_DIM, INNER, EXPERT_INNER, LAYERS, VOCAB, CONTEXT = 64, 4, 2, 16, 96, 48, 4, 320, 128
GENERIC, DEFAULT = "generic", "default"  # a part of the general sizes; a field that is left to the type

LINEAR_FULL = ["linear_attention", "full_attention"] * 2
SLIDING_FULL = ["sliding_attention", "full_attention"] * 2
CONV_FULL = ["conv", "full_attention"] * 2
SMALL_PART: Fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES: Fields = {
    **SMALL_PART,
    "image_size": 32,
    "patch_size": 8,
    "depth": 2,
    "num_heads": 4,
    "out_hidden_size": HIDDEN,
}
SOUND: Fields = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
TEXT: Fields = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "intermediate_size": INNER,
    "vocab_size": VOCAB,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
BYTES: Fields = SMALL_PART | {"num_attention_heads": 2, "vocab_size": 260, "max_position_embeddings": CONTEXT}
BYTE_PATCHES: Fields = BYTES | {"hidden_size_global": HIDDEN, "cross_attn_k": 2}

NEEDS: dict[str, Fields] = {
    "bailing_hybrid": {"layer_types": LINEAR_FULL, "num_key_value_heads": 4, "head_dim": HEAD_DIM},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "patcher_config": BYTES,
        "encoder_config": BYTE_PATCHES,
        "decoder_config": BYTE_PATCHES,
        "global_config": {key: TEXT[key] for key in (*SMALL_PART, "max_position_embeddings")},
        "encoder_hash_byte_group_vocab": 101,
        "encoder_hash_byte_group_size": [2, 3],
        "patching_threshold": 1.0,
        "vocab_size": 260,
    },
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "sliding_window": 8,
        "layer_types": SLIDING_FULL,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in set(SLIDING_FULL)},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": EXPERT_INNER, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "doge": {"num_experts": 4, "is_moe": False, "keep_window_size": 64},
    "dory": {"n_input_layers": 1, "n_output_layers": 1, "layer_types": SLIDING_FULL},
    "dots3_note": {"text_config": GENERIC, "vision_config": SMALL_PART, "audio_config": SOUND},
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "indexed_attention", "sliding_attention", "sliding_attention"],
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
        "sliding_window": 8,
    },
    "electra": {"embedding_size": 32},
    "emu3": {"text_config": {key: value for key, value in TEXT.items() if key != "head_dim"}},
    "falcon": {"ffn_hidden_size": INNER},
    "fuyu": {"text_config": TEXT | {"model_type": "persimmon"}, "image_size": 32, "patch_size": 8},
    "gemma3": {
        "text_config": TEXT | {"layer_types": SLIDING_FULL, "query_pre_attn_scalar": 16, "sliding_window": 8},
        "vision_config": SMALL_PART | {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8},
        "mm_tokens_per_image": 4,
    },
    "gemma3n_text": {
        "layer_types": SLIDING_FULL,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {"layer_types": SLIDING_FULL, "global_head_dim": 16, "hidden_size_per_layer_input": 0},
    "gemma4_unified_text": {"layer_types": SLIDING_FULL, "global_head_dim": 16},
    "git": {"vision_config": IMAGES},
    "got_ocr2": {
        "text_config": TEXT | {"model_type": "qwen2"},
        "vision_config": {
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 16,
            "mlp_dim": 48,
            "window_size": 2,
            "global_attn_indexes": [1],
        },
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": LINEAR_FULL},
    "hunyuan_v1_dense": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "kimi_linear": {"layer_types": LINEAR_FULL},
    "lfm2": {"layer_types": CONV_FULL, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": CONV_FULL},
    "lfm3": {"layer_types": CONV_FULL},
    "llama4_text": {"num_experts_per_tok": 1, "interleave_moe_layer_step": 2},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "moshi": {"audio_vocab_size": VOCAB, "num_codebooks": 2, "head_dim": HEAD_DIM},
    "moss_transcribe_diarize": {
        "text_config": TEXT | {"model_type": "qwen3"},
        "audio_config": SOUND | {"num_mel_bins": 16, "max_source_positions": 64},
    },
    "mpt": {"attn_config": {}},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp"], "num_hidden_layers": DEFAULT},
    "opt": {"word_embed_proj_dim": HIDDEN},
    "phi4_multimodal": {
        "vision_config": SMALL_PART | {"image_size": 32, "patch_size": 8, "crop_size": 32, "image_token_id": 310},
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_blocks": 2,
            "num_attention_heads": 4,
            "input_size": 16,
            "ext_pw_out_channel": 32,
            "nemo_conv_channels": 32,
            "audio_token_id": 311,
        },
    },
    "qwen4_exp": {"text_config": GENERIC},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "hc_lowrank": 8,
        "hc_count": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {
        "block_types": ("recurrent", "recurrent", "attention"),
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
    },
    "reformer": {
        "axial_pos_embds_dim": (32, 32),
        "axial_pos_shape": (8, 16),
        "attn_layers": ("local", "lsh"),
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
        "hash_seed": 0,
        "num_hidden_layers": DEFAULT,
    },
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 48},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": False},
    "xlm": {"causal": True, "is_encoder": True},
    "xlnet": {"mem_len": 0},
    "xlstm": {"qk_dim_factor": 1.0, "num_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 5,
        "mamba_dt_rank": 4,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "adapter_rank": 8,
        "num_mem_blocks": 1,
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
_DENSE = {"num_local_experts": 0, "num_experts_per_tok": 0}
# Name -> model type and what differs.
VARIANTS: dict[str, tuple[str, Fields]] = {
    "deepseek_v2: no query latent": ("deepseek_v2", {"q_lora_rank": None}),
    "deepseek_v3: dense": ("deepseek_v3", {"first_k_dense_replace": 4}),
    "doge: experts": ("doge", {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2}),
    "exaone4: hybrid": ("exaone4", {"sliding_window": 8, "sliding_window_pattern": 2}),
    "falcon: 40B": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 2}),
    "falcon: alibi": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "gemma4_text: E2B": ("gemma4_text", {"hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2}),
    "gemma4_text: 26B-A4B": (
        "gemma4_text",
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    ),
    "gemma4_text: 31B": ("gemma4_text", {"attention_k_eq_v": True, "num_global_key_value_heads": 2}),
    "gpt_bigcode: all heads": ("gpt_bigcode", {"multi_query": False}),
    "granitemoehybrid: micro": ("granitemoehybrid", _DENSE | {"layer_types": ["full_attention"] * 4}),
    "granitemoehybrid: h-micro": ("granitemoehybrid", _DENSE | {"layer_types": LINEAR_FULL}),
    "hunyuan_v1_moe: experts": ("hunyuan_v1_moe", {"num_experts": 4, "moe_topk": 2}),
    "jamba: dense": ("jamba", {"num_experts": 1, "num_experts_per_tok": 1}),
    "llama: biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama: yarn": ("llama", {"rope_parameters": _YARN}),
    "nemotron_h: dense": ("nemotron_h", {"layers_block_type": ["mamba", "mlp", "attention", "mlp"]}),
    "opt: 350m": ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "qwen2: sliding": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 8}),
    "stablelm: 12B": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
    "zamba2: adapters": ("zamba2", {"num_mem_blocks": 2, "use_shared_attention_adapter": True}),
}
