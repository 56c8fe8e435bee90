"""Runs a prefill and the decode steps after it, with the model's own forward and cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import StaticCache

from svdllm.inference.bench.roofline import takes_logits_to_keep
from svdllm.inference.cache_names import cache_name, cache_of

T = TypeVar("T")


@torch.inference_mode()
def prefill(model: Any, ids_BT: Tensor, length: int | None = None) -> Any:
    """Runs the prompts and returns the filled cache. Only the last logits are made, where the model can do this.

    With ``length`` the cache has slots for so many tokens from the start, so that its shape never changes; else it
    grows.
    """
    settings: dict[str, Any] = {"logits_to_keep": 1} if takes_logits_to_keep(type(model)) else {}
    if length is not None:
        settings[cache_name(model)] = StaticCache(config=model.config, max_cache_len=length)
    return cache_of(model(input_ids=ids_BT, use_cache=True, **settings))


@torch.inference_mode()
def decode(model: Any, cache: Any, ids_BG: Tensor) -> Any:
    """Runs ``G`` steps of one token each and returns the cache. The tokens are given, the same for every model."""
    name = cache_name(model)
    for ids_B1 in ids_BG.split(1, dim=1):
        cache = cache_of(model(input_ids=ids_B1, use_cache=True, **{name: cache}))
    return cache


def fixed_length(model: Any, ids_BS: Tensor) -> int | None:
    """Length of the cache of a compiled model, which is recompiled for every shape; None for a cache that grows."""
    return ids_BS.shape[1] if getattr(model, "_compiled_call_impl", None) is not None else None


def timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Returns the result of ``work`` and its seconds, by CUDA events on a GPU, else by the processor's clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        stream = torch.cuda.current_stream(device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        result = work()
        end.record(stream)
        end.synchronize()
        return result, begin.elapsed_time(end) / 1000
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def turn(model: Any, ids_BS: Tensor, prompt: int) -> tuple[float, float]:
    """Measures the seconds of a prefill of the first ``prompt`` tokens, and of decoding the others one by one."""
    cache, prefill_seconds = timed(
        lambda: prefill(model, ids_BS[:, :prompt], fixed_length(model, ids_BS)), ids_BS.device
    )
    _, decode_seconds = timed(lambda: decode(model, cache, ids_BS[:, prompt:]), ids_BS.device)
    return prefill_seconds, decode_seconds
