"""A prefill and the decode steps after it, by the model's own forward and cache."""

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
    """Runs the prompts; returns the filled cache. Logits are made of the last position, where the model can do that.

    ``length`` makes the cache one of so many tokens from the start, whose shape never changes; else it grows.
    """
    settings: dict[str, Any] = {"logits_to_keep": 1} if takes_logits_to_keep(type(model)) else {}
    if length is not None:
        settings[cache_name(model)] = StaticCache(config=model.config, max_cache_len=length)
    return cache_of(model(input_ids=ids_BT, use_cache=True, **settings))


@torch.inference_mode()
def decode(model: Any, cache: Any, ids_BG: Tensor) -> Any:
    """Runs ``G`` steps of one token each; the tokens are given, so that every model has the same."""
    name = cache_name(model)
    for ids_B1 in ids_BG.split(1, dim=1):
        cache = cache_of(model(input_ids=ids_B1, use_cache=True, **{name: cache}))
    return cache


def fixed_length(model: Any, ids_BS: Tensor) -> int | None:
    """Length of the cache of a compiled model, which is compiled anew for every other shape; None for a growing one."""
    return ids_BS.shape[1] if getattr(model, "_compiled_call_impl", None) is not None else None


def timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What it returns and its seconds: on CUDA by events on the device's own clock, else by the processor's."""
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
    """Seconds of the prefill of the first ``prompt`` tokens, and of decoding the others one by one."""
    cache, prefill_seconds = timed(
        lambda: prefill(model, ids_BS[:, :prompt], fixed_length(model, ids_BS)), ids_BS.device
    )
    _, decode_seconds = timed(lambda: decode(model, cache, ids_BS[:, prompt:]), ids_BS.device)
    return prefill_seconds, decode_seconds
