"""Shapes of models as they were published, 2023 to 2026: what their configs say, where a type's default differs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Fields = dict[str, Any]
FULL, LINEAR = "full_attention", "linear_attention"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A model as it was published.

    Args:
        type: ``model_type`` of its config.
        fields: of the config, beside the defaults of the type.
        hybrid: whether its blocks hold state spaces, convolutions or linear attention.
        quantization: ``quantization_config``, where the weights are published quantised.
    """

    type: str
    fields: Fields = field(default_factory=dict)
    hybrid: bool = False
    quantization: Fields | None = None


def _decoder(
    hidden: int, inner: int, layers: int, heads: tuple[int, int], vocabulary: int = 0, **others: Any
) -> Fields:
    """Fields of a decoder of equal layers; ``heads`` are those of queries and of keys."""
    sizes: Fields = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
    }
    return sizes | ({"vocab_size": vocabulary} if vocabulary else {}) | others


def _layers(count: int, every_other: str, at: tuple[int, ...], there: str = FULL) -> list[str]:
    """Layer types: ``there`` at some places, and another one elsewhere."""
    return [there if index in at else every_other for index in range(count)]


TIED: Fields = {"tie_word_embeddings": True}
FP8: Fields = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
MXFP4: Fields = {"quant_method": "mxfp4"}
SLIDING = ["sliding_attention"] * 4 + [FULL]
MAMBA = {"M": "mamba", "-": "mlp", "*": "attention"}
_NO_EXPERTS: Fields = {"num_local_experts": 0, "num_experts_per_tok": 0}
_GRANITE_FULL = (5, 15, 25, 35)
_GRANITE_MICRO = _decoder(2048, 8192, 40, (32, 8), 100352, shared_intermediate_size=8192) | _NO_EXPERTS | TIED
_GEMMA_4: Fields = {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True}

DENSE: dict[str, Published] = {
    "Llama-3.2-1B": Published(type="llama", fields=_decoder(2048, 8192, 16, (32, 8), 128256, head_dim=64) | TIED),
    "Llama-3.1-8B": Published(type="llama", fields=_decoder(4096, 14336, 32, (32, 8), 128256)),
    "SmolLM2-1.7B": Published(type="llama", fields=_decoder(2048, 8192, 24, (32, 32), 49152) | TIED),
    "Falcon3-7B": Published(type="llama", fields=_decoder(3072, 23040, 28, (12, 4), 131072, head_dim=256)),
    "SmolLM3-3B": Published(type="smollm3"),
    "Qwen2.5-7B": Published(type="qwen2", fields=_decoder(3584, 18944, 28, (28, 4), 152064)),
    "Qwen3-0.6B": Published(type="qwen3", fields=_decoder(1024, 3072, 28, (16, 8), 151936, head_dim=128) | TIED),
    "Qwen3-8B": Published(type="qwen3", fields=_decoder(4096, 12288, 36, (32, 8), 151936, head_dim=128)),
    "Gemma-2-2B": Published(type="gemma2"),
    "Gemma-3-1B": Published(type="gemma3_text", fields=_decoder(1152, 6912, 26, (4, 1), 262144)),
    "Gemma-3n-E2B, text": Published(
        type="gemma3n_text",
        fields={
            "num_hidden_layers": 30,
            "intermediate_size": 8192,
            "num_kv_shared_layers": 10,
            "layer_types": SLIDING * 6,
        },
    ),
    "Gemma-4-E2B, text": Published(
        type="gemma4_text",
        fields=_decoder(1536, 6144, 35, (8, 1), num_kv_shared_layers=20, layer_types=SLIDING * 7),
    ),
    "Gemma-4-31B, text": Published(type="gemma4_text", fields=_decoder(5376, 21504, 60, (32, 16)) | _GEMMA_4),
    "Mistral-7B-v0.3": Published(type="mistral", fields=_decoder(4096, 14336, 32, (32, 8), 32768)),
    "Ministral-3-8B, text": Published(type="ministral3"),
    "Phi-2": Published(type="phi", fields=_decoder(2560, 10240, 32, (32, 32), 51200)),
    "Phi-3-mini": Published(type="phi3", fields=_decoder(3072, 8192, 32, (32, 32), 32064)),
    "Phi-4": Published(type="phi3", fields=_decoder(5120, 17920, 40, (40, 10), 100352, pad_token_id=0, eos_token_id=1)),
    "GLM-4-9B-0414": Published(type="glm4"),
    "OLMo-2-7B": Published(type="olmo2", fields={"vocab_size": 100352}),
    "OLMo-3-7B": Published(type="olmo3", fields={"vocab_size": 100278}),
    "Granite-3.3-8B": Published(type="granite", fields=_decoder(4096, 12800, 40, (32, 8), 49159) | TIED),
    "Granite-4.0-micro": Published(
        type="granitemoehybrid",
        fields=_decoder(2560, 8192, 40, (40, 8), 100352, shared_intermediate_size=8192, layer_types=[FULL] * 40)
        | _NO_EXPERTS
        | TIED,
    ),
    "Falcon-7B": Published(type="falcon"),
    "StableLM-2-1.6B": Published(type="stablelm", fields=_decoder(2048, 5632, 24, (32, 32), 100352)),
    "Minitron-4B": Published(type="nemotron", fields=_decoder(3072, 9216, 32, (24, 8), 256000, head_dim=128)),
    "Hunyuan-7B": Published(type="hunyuan_v1_dense", fields=_decoder(4096, 14336, 32, (32, 8), 128256, head_dim=128)),
    "ERNIE-4.5-0.3B": Published(type="ernie4_5"),
    "Seed-OSS-36B": Published(type="seed_oss", fields=_decoder(5120, 27648, 64, (80, 8), 155136, head_dim=128)),
    "EXAONE-4.0-1.2B": Published(type="exaone4", fields=_decoder(2048, 4096, 30, (32, 8), 102400) | TIED),
    "Command-R-35B": Published(type="cohere"),
    "Command-R7B": Published(type="cohere2", fields=_decoder(4096, 14336, 32, (32, 8), 256000) | TIED),
    "Apertus-8B": Published(type="apertus", fields=_decoder(4096, 21504, 32, (32, 8), 131072)),
    "AFM-4.5B": Published(type="arcee", fields=_decoder(2560, 18432, 36, (20, 4), 128004, head_dim=128)),
    "GPT-J-6B": Published(type="gptj"),
    "BLOOM-7B1": Published(type="bloom", fields={"hidden_size": 4096, "n_layer": 30, "n_head": 32}),
    "OPT-6.7B": Published(
        type="opt",
        fields={"hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
    "MPT-7B": Published(type="mpt", fields={"d_model": 4096, "n_heads": 32, "n_layers": 32}),
    "StarCoder2-7B": Published(type="starcoder2", fields=_decoder(4608, 18432, 32, (36, 4), 49152)),
    "BitNet-2B-4T": Published(
        type="bitnet",
        quantization={"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"},
    ),
}

MIXTURES: dict[str, Published] = {
    "Llama-4-Scout, text": Published(type="llama4_text"),
    "Qwen3-30B-A3B": Published(
        type="qwen3_moe",
        fields=_decoder(2048, 6144, 48, (32, 4), 151936, head_dim=128)
        | {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
    ),
    "Gemma-4-26B-A4B, text": Published(
        type="gemma4_text",
        fields=_decoder(2816, 2112, 30, (16, 8), enable_moe_block=True, num_experts=128, top_k_experts=8)
        | {"moe_intermediate_size": 704}
        | _GEMMA_4,
    ),
    "Mixtral-8x7B": Published(type="mixtral"),
    "Phi-3.5-MoE": Published(type="phimoe"),
    "DeepSeek-V2-Lite": Published(
        type="deepseek_v2",
        fields=_decoder(2048, 10944, 27, (16, 16), 102400, moe_intermediate_size=1408, q_lora_rank=None)
        | {"first_k_dense_replace": 1, "num_experts_per_tok": 6},
    ),
    "DeepSeek-V3, R1": Published(type="deepseek_v3", fields={"num_mtp_layers": 0}, quantization=FP8),
    "DeepSeek-V3.2": Published(type="deepseek_v32", quantization=FP8),
    "gpt-oss-20b": Published(
        type="gpt_oss", fields={"num_hidden_layers": 24, "num_local_experts": 32}, quantization=MXFP4
    ),
    "gpt-oss-120b": Published(type="gpt_oss", quantization=MXFP4),
    "GLM-4.5-Air": Published(type="glm4_moe", fields={"num_mtp_layers": 0}),
    "GLM-4.7-Flash": Published(type="glm4_moe_lite"),
    "OLMoE-1B-7B": Published(type="olmoe"),
    "MiniMax-M2": Published(type="minimax_m2", quantization=FP8),
    "Hunyuan-A13B": Published(
        type="hunyuan_v1_moe",
        fields=_decoder(4096, 3072, 32, (32, 8), 128167, head_dim=128, num_experts=64, moe_topk=8),
    ),
    "ERNIE-4.5-21B-A3B": Published(type="ernie4_5_moe"),
}

HYBRIDS: dict[str, Published] = {
    "Qwen3-Next-80B-A3B": Published(type="qwen3_next", hybrid=True),
    "Qwen3.5-9B, text": Published(type="qwen3_5_text", hybrid=True),
    "Qwen3.5-35B-A3B, text": Published(type="qwen3_5_moe_text", hybrid=True),
    "Granite-4.0-h-micro": Published(
        type="granitemoehybrid",
        hybrid=True,
        fields=_GRANITE_MICRO
        | {"mamba_n_heads": 64, "mamba_d_state": 128, "layer_types": _layers(40, LINEAR, _GRANITE_FULL)},
    ),
    "Granite-4.0-h-small": Published(
        type="granitemoehybrid",
        hybrid=True,
        fields=_decoder(4096, 768, 40, (32, 8), 100352, shared_intermediate_size=1536)
        | {"num_local_experts": 72, "num_experts_per_tok": 10, "mamba_n_heads": 128, "mamba_d_state": 128}
        | {"layer_types": _layers(40, LINEAR, _GRANITE_FULL)}
        | TIED,
    ),
    "Falcon-H1-7B": Published(
        type="falcon_h1",
        hybrid=True,
        fields=_decoder(3072, 12288, 44, (12, 2), 130049, mamba_d_ssm=3072, mamba_n_heads=24)
        | {"mamba_d_head": 128, "mamba_d_state": 256},
    ),
    "Nemotron-Nano-9B-v2": Published(
        type="nemotron_h",
        hybrid=True,
        fields={
            "hidden_size": 4480,
            "intermediate_size": 15680,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "mamba_num_heads": 128,
            "mamba_head_dim": 80,
            "ssm_state_size": 128,
            "vocab_size": 131072,
            "layers_block_type": [MAMBA[c] for c in "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"],
        },
    ),
    "Kimi-Linear-48B-A3B": Published(type="kimi_linear", hybrid=True),
    "MiniMax-Text-01": Published(
        type="minimax",
        hybrid=True,
        fields=_decoder(
            6144,
            9216,
            80,
            (64, 8),
            200064,
            head_dim=128,
            num_local_experts=32,
            layer_types=_layers(80, "linear_attention", tuple(range(7, 80, 8))),
        ),
    ),
    "LFM2-1.2B": Published(
        type="lfm2", hybrid=True, fields=_decoder(2048, 12288, 16, (32, 8), full_attn_idxs=[2, 5, 8, 10, 12, 14])
    ),
    "LFM2-8B-A1B": Published(
        type="lfm2_moe",
        hybrid=True,
        fields={"num_hidden_layers": 24, "layer_types": _layers(24, "conv", (2, 6, 10, 14, 18, 21))},
    ),
    "Jamba-1.5-Mini": Published(type="jamba", hybrid=True),
    "Mamba-2.8B": Published(type="mamba", hybrid=True, fields={"hidden_size": 2560, "num_hidden_layers": 64}),
    "Mamba2, Codestral-Mamba-7B": Published(type="mamba2", hybrid=True),
    "Falcon-Mamba-7B": Published(
        type="falcon_mamba", hybrid=True, fields={"hidden_size": 4096, "num_hidden_layers": 64, "vocab_size": 65024}
    ),
    "RecurrentGemma-2B": Published(type="recurrent_gemma", hybrid=True),
    "Bamba-9B": Published(type="bamba", hybrid=True, fields={"attn_layer_indices": [9, 18, 27]}),
}

WRAPPERS: dict[str, Published] = {
    "Llama-4-Scout-17B-16E": Published(type="llama4", fields={"text_config": {}}),
    "Qwen3.5-27B": Published(
        type="qwen3_5",
        hybrid=True,
        fields={"text_config": _decoder(5120, 17408, 64, (24, 4), linear_num_value_heads=48)},
    ),
    "Gemma-3-4B": Published(
        type="gemma3",
        fields={
            "text_config": _decoder(2560, 10240, 34, (8, 4)),
            "vision_config": {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "image_size": 896,
                "patch_size": 14,
            },
        },
    ),
}

PUBLISHED = DENSE | MIXTURES | HYBRIDS | WRAPPERS
