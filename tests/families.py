"""Tiny random models of real classes: one for every way in which families differ that matters to a factorisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from svdllm.models.low_rank import FORMAT_VERSION, family_classes, low_rank_config
from svdllm.models.low_rank.info import LowRankInfo

_COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA = {**_COMMON, "num_key_value_heads": 2}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_GQA, **_ROPE, "tie_word_embeddings": True},
    "mistral": {**_GQA, **_ROPE},
    "qwen2": {**_GQA, "tie_word_embeddings": True},
    "qwen3": {**_GQA, "head_dim": 16},
    "gemma3_text": {
        **_GQA,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            "full_attention": {"rope_type": "default", "rope_theta": 5e5},
        },
    },
    "gemma4_text": {
        **_GQA,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "global_head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,  # the last two layers take keys and values from the first two
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 300,
    },
    "opt": {
        **{key: value for key, value in _COMMON.items() if key != "intermediate_size"},
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
    },
    "gpt2": {
        "vocab_size": 128,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "gpt_neox": _COMMON,
    "phi3": _GQA,
    "falcon": {
        **{key: value for key, value in _COMMON.items() if key != "intermediate_size"},
        "ffn_hidden_size": 48,
        "parallel_attn": True,
        "alibi": False,
        "new_decoder_architecture": False,
        "multi_query": True,
    },
    "stablelm": {**_GQA, "use_qkv_bias": True},
}
# Families that differ in how they make keys: no rotation in some layers, neighbours in pairs, a part of each head, a
# norm of all heads, a norm after the rotation.
ATTENTIONS: dict[str, dict[str, Any]] = {
    "smollm3": {**_GQA, "no_rope_layers": [1, 0]},
    "cohere": _GQA,
    "glm": {**_GQA, "head_dim": 8},
    "olmo2": _GQA,
    "hunyuan_v1_dense": {**_GQA, "head_dim": 8},
}
# Families that are initialised or named in ways of their own: a buffer in no file that the body's initialisation sets;
# an initialisation that asks for the weight of a linear; a body that is not called by the prefix of its class.
UNUSUAL: dict[str, dict[str, Any]] = {
    "falcon_h1": {
        **_GQA,
        "head_dim": 8,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
    }
    | {"ssm_multipliers": [0.5, 2.0, 0.25, 3.0, 1.5]},
    "nanochat": _GQA,
    "llama4_text": {**_GQA, "head_dim": 8, "intermediate_size_mlp": 48, "moe_layers": []},
}
# Families that do something with the scores: cap them, or let them compete with a learnt one that no token gets.
SCORES: dict[str, dict[str, Any]] = {
    "gemma2": {**_GQA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "attn_logit_softcapping": 0.5},
    "gpt_oss": {**_GQA, **_ROPE, "head_dim": 8, "sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
}

# Families whose MLPs have a width that no entry of the config sets.
FIXED_WIDTHS: dict[str, dict[str, Any]] = {
    "bloom": {
        **{key: value for key, value in _COMMON.items() if key != "intermediate_size"},
        "n_head": 4,
        "n_layer": 2,
    },
}
_MOE = {**_GQA, "moe_intermediate_size": 24}
_LATENT = {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
_LATENT_MOE = {**_COMMON, **_LATENT, "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2}
# Families with experts, which files keep one by one or stacked, and routers of several kinds.
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_MOE, "num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**_MOE, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "olmoe": {**_GQA, "num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {**_LATENT_MOE, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "n_shared_experts": 1},
    "deepseek_v3": {**_LATENT_MOE, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "n_shared_experts": 1},
    "glm4_moe": {**_MOE, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "head_dim": 8},
    "granitemoe": {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "minimax_m2": {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "dbrx": {
        "vocab_size": 128,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "jetmoe": {
        "vocab_size": 128,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "kv_channels": 16,
        "intermediate_size": 24,
        "num_local_experts": 4,
        "max_position_embeddings": 64,
    },
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
_MIXED_LAYERS = {"layer_types": ["linear_attention", "full_attention"]}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# Families with state spaces, convolutions, weights that are read and not called, or blocks of several kinds.
HYBRIDS: dict[str, dict[str, Any]] = {
    "mamba": {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "mamba2": {
        "vocab_size": 128,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
        "num_heads": 4,
        "head_dim": 16,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "falcon_mamba": {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "bamba": {**_GQA, **_MAMBA, "attn_layer_indices": [1]},
    "jamba": {
        **_GQA,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 4,
        "mamba_d_state": 8,
        "num_experts": 1,
        "num_experts_per_tok": 1,
    },
    "granitemoehybrid": {
        **_GQA,
        **_MAMBA,
        **_MIXED_LAYERS,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 48,
    },
    "lfm2": {**_GQA, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen3_5_text": {**_GQA, **_DELTA, **_MIXED_LAYERS, "head_dim": 8},
    "qwen3_next": {
        **_MOE,
        **_DELTA,
        **_MIXED_LAYERS,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 24,
    },
    "lfm2_moe": {
        **_MOE,
        "layer_types": ["conv", "full_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_dense_layers": 1,
    },
    "recurrent_gemma": {
        **_COMMON,
        "num_key_value_heads": 1,
        "lru_width": 32,
        "block_types": ("recurrent", "attention"),
        "attention_window_size": 8,
    },
    "bart": {
        "vocab_size": 128,
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
        "is_decoder": True,
        "is_encoder_decoder": False,
    },
    # Several streams of hidden states, in a dimension before that of texts; keys and values shared through a mapping.
    "gemma3n_text": {
        **_GQA,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 128,
        "altup_num_inputs": 2,
        "laurel_rank": 8,
    },
    "rwkv": {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
    "openai-gpt": {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}

_ALL = FAMILIES | ATTENTIONS | UNUSUAL | SCORES | FIXED_WIDTHS | MIXTURES | HYBRIDS


def tiny_config(family: str, **overrides: Any) -> Any:
    """A config of ``family`` with two layers of width 32 and 128 tokens."""
    return CONFIG_MAPPING[family](**{**_ALL[family], **overrides})


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A float32 model in eval mode with random weights, biases and norms; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def stored_ranks(config: Any) -> dict[str, int]:
    """Linear -> rank, by a low-rank config or the content of its file."""
    info = LowRankInfo.of(config)
    assert info is not None
    return info.ranks


def low_rank_model(family: str, seed: int = 0, dense: tuple[str, ...] = (), **overrides: Any) -> Any:
    """A random low-rank model in eval mode, of ranks 5, 6 and 7 by turns; linears named as in ``dense`` stay dense."""
    base = tiny_model(family, seed, **overrides)
    names = [name for name in linear_targets(base) if not name.endswith(dense or ("-",))]
    ranks = {name: 5 + index % 3 for index, name in enumerate(names)}
    forms = {name: {"form": "pair", "rank": rank} for name, rank in ranks.items()}
    settings = {"format_version": FORMAT_VERSION, "base_model_type": family, "forms": forms}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family_classes(family).causal_lm(low_rank_config(base.config, settings)).eval()


def tiny_tokens(batch: int = 2, length: int = 12, seed: int = 1) -> Tensor:
    """``(batch, length)`` token ids, none of them special."""
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def linear_targets(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear inside the blocks, by its name in ``named_modules``."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and any(part.isdigit() for part in name.split("."))
    }


def dense_weight(linear: nn.Module) -> Tensor:
    """``(out_features, in_features)``, also of a ``Conv1D``, which stores the transpose."""
    weight = linear.weight.detach()
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(linear, Conv1D) else weight
