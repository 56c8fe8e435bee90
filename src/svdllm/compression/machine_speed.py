"""Measures how fast this machine multiplies, decomposes and runs through activations, in the shapes of a model.

A CPU is measured with one thread, and its speed is scaled to the threads of a run. Threads wait for each other: where
other processes take the cores, a short operation on two threads takes between once and a hundred times its time on an
idle machine, and tells nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from statistics import median

import torch
import torch.nn.functional as F

# Sizes of the measured operations, 1 to 5 ms each on one core: long enough to be timed, and short enough for the best
# of several to run without interruption by other processes. A GPU needs larger ones to be busy at all.
MOST_TOKENS, MOST_FEATURES, MOST_EIGH = 256, 768, 256
GPU_FACTOR = 5
LEAST_SAMPLES, MOST_SAMPLES = 8, 25
ENOUGH_SECONDS = 0.04  # for one operation, beyond the least number of samples
# Powers of the number of threads by which they speed up products, which share little, and what is limited by memory.
PRODUCTS, OTHERS = 0.9, 0.5


@dataclass(frozen=True)
class MachineSpeed:
    """Work per second."""

    multiply: float  # floating-point operations of a product in the compute dtype
    multiply32: float  # the same in float32, in which Grams are summed
    multiply64: float  # and in float64, in which weights are decomposed
    eigh: float  # cubes of the size of a symmetric float64 matrix whose eigenvectors are found
    elements: float  # activations, in the compute dtype, that an element-wise operation reads and writes


def measure_speed(
    device: torch.device, dtype: torch.dtype, out_features: int, in_features: int
) -> tuple[MachineSpeed, MachineSpeed]:
    """The best and the median speed of several short operations, in the shape of a linear of the model.

    Results are kept for the shape. The best is the speed of an idle machine; other processes lower the median.
    """
    if device.type != "cpu":
        most = GPU_FACTOR * MOST_FEATURES
        return _measured(device, dtype, min(out_features, most), min(in_features, most), GPU_FACTOR, 1)
    out_features, in_features = min(out_features, MOST_FEATURES), min(in_features, MOST_FEATURES)
    with _one_thread() as threads:
        return _measured(device, dtype, out_features, in_features, 1, threads)


def busy_share() -> float:
    """Runnable threads, this process's among them, for every core: above 1 the machine is shared."""
    if not hasattr(os, "getloadavg"):  # Windows
        return 1.0
    return (os.getloadavg()[0] + torch.get_num_threads()) / (os.cpu_count() or 1)


@cache
def _measured(
    device: torch.device, dtype: torch.dtype, out_features: int, in_features: int, scale: int, threads: int
) -> tuple[MachineSpeed, MachineSpeed]:
    """Measures on one thread and scales to ``threads``; ``scale`` is that of the operations."""
    tokens, size = scale * MOST_TOKENS, min(out_features, in_features, scale * MOST_EIGH)
    x_TI = torch.rand(tokens, in_features, device=device)
    weight_OI = torch.rand(out_features, in_features, device=device)
    symmetric = (weight_OI[:size, :size] + weight_OI[:size, :size].mT).double()
    activations = x_TI.to(dtype)

    def product(of: torch.dtype) -> Callable[[], torch.Tensor]:
        left, right = x_TI.to(of), weight_OI.to(of)
        return lambda: F.linear(left, right)

    products, others = threads**PRODUCTS, threads**OTHERS
    work = 2.0 * tokens * out_features * in_features * products
    measured = [
        _work_per_second(product(dtype), work),
        _work_per_second(product(torch.float32), work),
        _work_per_second(product(torch.float64), work),
        _work_per_second(lambda: torch.linalg.eigh(symmetric).eigenvectors, size**3 * others),
        _work_per_second(lambda: F.silu(activations), activations.numel() * others),
    ]
    best, typical = (MachineSpeed(*speeds) for speeds in zip(*measured, strict=True))
    return best, typical


def _work_per_second(run: Callable[[], torch.Tensor], work: float) -> tuple[float, float]:
    """By the best and by the median time of several runs."""
    run()[0, 0].item()
    times: list[float] = []
    while len(times) < LEAST_SAMPLES or (len(times) < MOST_SAMPLES and sum(times) < ENOUGH_SECONDS):
        started = time.perf_counter()
        run()[0, 0].item()  # which waits for a GPU
        times.append(time.perf_counter() - started)
    return work / min(times), work / median(times)


@contextmanager
def _one_thread() -> Iterator[int]:
    """torch computes on one thread while the context lasts; yields the number that it has otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
