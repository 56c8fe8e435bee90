"""Measures the memory of inference: weights, cache and activations."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from svdllm.common.memory import parameter_bytes, require_memory
from svdllm.inference.bench.forward import decode, fixed_length, prefill
from svdllm.inference.bench.records import MemoryUse
from svdllm.inference.bench.roofline import ModelShape


def cache_bytes(cache: Any) -> int:
    """Bytes of the storages behind the tensors of a cache; a view keeps its whole storage in memory."""
    storages = {}
    for layer in cache.layers:
        for tensor in vars(layer).values():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure_memory(model: Any, shape: ModelShape, ids_BS: Tensor, prompt: int) -> MemoryUse:
    """Measures the memory of a prefill and its decode steps, in a pass that is not timed.

    Activations are the peak beyond weights and the final cache, by the counters of the CUDA allocator, or on the CPU by
    the allocations that torch's profiler records.
    """
    measure = _peak_on_cuda if ids_BS.device.type == "cuda" else _peak_on_cpu
    cache, peak = measure(model, ids_BS, prompt)
    held = cache_bytes(cache)
    return MemoryUse(
        weights=parameter_bytes(model),
        cache=held,
        cache_by_formula=shape.cache_bytes(*ids_BS.shape),
        activations=peak - held,
    )


def require_cell_memory(shape: ModelShape, batch: int, prompt: int, gen: int) -> None:
    """Raises ResourceError if a CPU lacks the memory for the cache and the input and output of one linear.

    Otherwise Linux kills the process without a message.
    """
    least = shape.cache_bytes(batch, prompt + gen) + 2 * batch * prompt * shape.widest_bytes
    require_memory(least, "Out of memory: cache and activations need at least", torch.device("cpu"))


def _run(model: Any, ids_BS: Tensor, prompt: int) -> Any:
    return decode(model, prefill(model, ids_BS[:, :prompt], fixed_length(model, ids_BS)), ids_BS[:, prompt:])


def _peak_on_cuda(model: Any, ids_BS: Tensor, prompt: int) -> tuple[Any, int]:
    torch.cuda.synchronize(ids_BS.device)
    torch.cuda.reset_peak_memory_stats(ids_BS.device)
    before = torch.cuda.memory_allocated(ids_BS.device)
    cache = _run(model, ids_BS, prompt)
    torch.cuda.synchronize(ids_BS.device)
    return cache, torch.cuda.max_memory_allocated(ids_BS.device) - before


def _peak_on_cpu(model: Any, ids_BS: Tensor, prompt: int) -> tuple[Any, int]:
    with _profiler_says_nothing(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        cache = _run(model, ids_BS, prompt)
    assert profiler.profiler is not None
    events: Any = profiler.profiler.kineto_results
    changes = sorted((event.start_ns(), event.nbytes()) for event in events.events() if event.name() == "[memory]")
    return cache, max(accumulate(size for _, size in changes))


@contextmanager
def _profiler_says_nothing() -> Iterator[None]:
    """Silences torch's profiler: some versions write to the file descriptor of standard error when they start."""
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
