"""Builds a model on the meta device, without its weights."""

from __future__ import annotations

import copy
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from svdllm.common.errors import UnsupportedModelError, first_line
from svdllm.models.low_rank.families import auto_class
from svdllm.models.low_rank.lowrank import SplitExperts, split_experts

LARGE = 2**24  # values of a tensor


class _WithoutMemory(TorchFunctionMode):
    """Makes large tensors on the meta device, whatever fills them: constructors fill experts only to be overwritten."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn):
            shape = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
            if prod(shape) > LARGE:
                kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


def build_skeleton(
    config: PreTrainedConfig, dtype: torch.dtype = torch.float32, *, split: Collection[str] | None = None
) -> PreTrainedModel:
    """Builds a model on the meta device, with real buffers (the constructor computes rotary tables).

    Args:
        split: the stacked experts of a dense model that become modules of linears (``SplitExperts``), by the names of
            their modules; by default all.

    Raises:
        UnsupportedModelError: transformers cannot build a model with this config.
    """
    config = copy.deepcopy(config)  # building a model writes the dtype into its config
    if "flash" in (getattr(config, "_attn_implementation", None) or ""):
        config._attn_implementation = "sdpa"  # the same function, on any device and in any dtype
    try:
        skeleton = _built(config, dtype)
    except MemoryError:
        raise
    except Exception as error:  # of any kind, by the class and what is wrong in the config
        raise UnsupportedModelError(
            f"transformers cannot build a model of type {config.model_type!r} from its config: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    if getattr(config, "svdllm", None) is None:  # else its class has split those that have a form
        split_experts(skeleton, split)
    for module in skeleton.modules():
        if isinstance(module, SplitExperts):
            module.grouped = False  # weights are put into single linears for a while
    return skeleton.eval().requires_grad_(False)


def _built(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    def build(mode: AbstractContextManager[Any]) -> PreTrainedModel:
        with init_empty_weights(include_buffers=False), mode:
            return auto_class(config.model_type).from_config(config, dtype=dtype, trust_remote_code=False)

    try:
        skeleton = build(_WithoutMemory())
        computed = not any(buffer.is_meta for buffer in skeleton.buffers())
    except Exception:  # of any kind, by what the constructor does with a large table
        computed = False
    return skeleton if computed else build(nullcontext())
