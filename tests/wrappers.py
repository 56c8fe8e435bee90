"""Tiny random wrappers around a language model, of real classes, with a random image for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from families import FAMILIES, HYBRIDS
from svdllm.models.low_rank.families import auto_class

IMAGE, IMAGE_START = 120, 119  # token ids
SIDE, PATCH = 16, 4  # pixels
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_TOKENS = {"image_token_id": IMAGE, "vision_start_token_id": IMAGE_START, "vision_end_token_id": 118}
_TOKENS |= {"video_token_id": 117}
_QWEN_VISION = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": PATCH}
_QWEN_VISION |= {"out_hidden_size": 32}
_QWEN3_VISION = _QWEN_VISION | {"num_position_embeddings": 16}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}

# Model type -> the entries of its config.
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": FAMILIES["gemma3_text"],
        "vision_config": _VISION | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
    },
    "gemma4": {
        "text_config": FAMILIES["gemma4_text"] | {"use_bidirectional_attention": "vision"},
        "vision_config": {key: value for key, value in _VISION.items() if key != "image_size"}
        | {"num_key_value_heads": 2, "head_dim": 8, "pooling_kernel_size": 2, "position_embedding_size": 8},
        "audio_config": None,
        "image_token_id": IMAGE,
        "video_token_id": 117,
        "audio_token_id": 116,
    },
    "qwen2_5_vl": {
        "text_config": FAMILIES["qwen2"] | {"rope_parameters": _MROPE, "tie_word_embeddings": False},
        "vision_config": _QWEN_VISION | {"fullatt_block_indexes": [1], "window_size": 16},
        **_TOKENS,
    },
    "qwen3_vl": {
        "text_config": FAMILIES["qwen3"] | {"head_dim": 8, "rope_parameters": _MROPE},
        "vision_config": _QWEN3_VISION | {"deepstack_visual_indexes": [0]},
        **_TOKENS,
    },
    "mistral3": {
        "text_config": FAMILIES["mistral"] | {"model_type": "mistral", "head_dim": 8},
        "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 8},
        "image_token_index": IMAGE,
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
    },
    "llava": {
        "text_config": FAMILIES["llama"] | {"model_type": "llama", "tie_word_embeddings": False},
        "vision_config": _VISION | {"model_type": "clip_vision_model", "projection_dim": 16},
        "image_token_index": IMAGE,
    },
    "qwen3_5": {
        "text_config": HYBRIDS["qwen3_5_text"],
        "vision_config": _QWEN3_VISION,
        **_TOKENS,
    },
    "llama4": {
        "text_config": FAMILIES["llama"]
        | {"head_dim": 8, "intermediate_size_mlp": 48, "moe_layers": [], "tie_word_embeddings": False},
        "vision_config": _VISION
        | {
            "intermediate_size": 64,
            "vision_output_dim": 24,
            "projector_input_dim": 24,
            "projector_output_dim": 24,
        },
        "image_token_index": IMAGE,
    },
}


def tiny_wrapper(model_type: str, seed: int = 0, **text: Any) -> Any:
    """A float32 wrapper in eval mode with random weights, whose parts all matter for the logits.

    Args:
        text: other entries of the config of its language model.
    """
    entries = WRAPPERS[model_type]
    config = CONFIG_MAPPING[model_type](**entries | {"text_config": entries["text_config"] | text})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class(model_type).from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def with_image(model_type: str, seed: int = 2) -> dict[str, Tensor]:
    """A text around a random image, as the arguments of a wrapper's ``forward`` and ``generate``."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(1, 3, SIDE, SIDE, generator=generator)
    image = {"pixel_values": pixels}
    patches = (SIDE // PATCH) ** 2
    count = patches if model_type == "llava" else patches // 4
    if model_type.startswith("qwen"):
        rows = torch.rand(patches, 3 * 2 * PATCH**2, generator=generator)
        side = SIDE // PATCH
        image = {"pixel_values": rows, "image_grid_thw": torch.tensor([[1, side, side]])}
    elif model_type == "gemma4":
        grid = torch.cartesian_prod(torch.arange(SIDE // PATCH), torch.arange(SIDE // PATCH)).flip(-1)
        rows = torch.rand(1, patches, 3 * PATCH**2, generator=generator)
        image = {"pixel_values": rows, "image_position_ids": grid.unsqueeze(0)}
    elif model_type == "mistral3":
        image |= {"image_sizes": torch.tensor([[SIDE, SIDE]])}
    before, after = torch.randint(3, 110, (2, 1, 5), generator=generator)
    ids = torch.cat((before, torch.tensor([[IMAGE_START]]), torch.full((1, count), IMAGE), after), dim=1)
    is_image = (ids == IMAGE).long()
    kinds = "token_type_ids" if model_type == "gemma3" else "mm_token_type_ids"
    typed = model_type.startswith(("gemma", "qwen"))
    return {"input_ids": ids, **image, **({kinds: is_image} if typed else {})}
