"""Builds a model on the meta device, without its weights."""

from __future__ import annotations

import copy

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from svdllm.common.errors import UnsupportedModelError, first_line


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Builds a model on the meta device, with real buffers (the constructor computes rotary tables).

    Raises:
        UnsupportedModelError: transformers cannot build a model with this config.
    """
    config = copy.deepcopy(config)  # building a model writes the dtype into its config
    if "flash" in (getattr(config, "_attn_implementation", None) or ""):
        config._attn_implementation = "sdpa"  # the same function, on any device and in any dtype
    try:
        with init_empty_weights(include_buffers=False):
            skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # of any kind, by the class and what is wrong in the config
        raise UnsupportedModelError(
            f"transformers cannot build a model of type {config.model_type!r} from its config: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    return skeleton.eval().requires_grad_(False)
