"""Measures how fast this machine multiplies, decomposes and runs through activations, in the shapes of a model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import median

import torch
import torch.nn.functional as F

# Sizes of the measured operations, about 10 ms each on one core: long enough to be timed, and short enough for the best
# of several to run without interruption by other processes. A GPU needs larger ones to be busy at all.
MOST_TOKENS, MOST_FEATURES, MOST_EIGH = 512, 1024, 384
GPU_FACTOR = 4
LEAST_SAMPLES, MOST_SAMPLES = 5, 12
ENOUGH_SECONDS = 0.04  # for one operation, beyond the least number of samples


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

    What was measured for a shape is kept. The best is what an idle machine does; the median falls with what else runs.
    """
    scale = 1 if device.type == "cpu" else GPU_FACTOR
    most = scale * MOST_FEATURES
    return _measured(device, dtype, min(out_features, most), min(in_features, most), scale)


def busy_share() -> float:
    """Runnable threads, this process's among them, for every core: above 1 the machine is shared."""
    if not hasattr(os, "getloadavg"):  # Windows
        return 1.0
    return (os.getloadavg()[0] + torch.get_num_threads()) / (os.cpu_count() or 1)


@cache
def _measured(
    device: torch.device, dtype: torch.dtype, out_features: int, in_features: int, scale: int
) -> tuple[MachineSpeed, MachineSpeed]:
    tokens, size = scale * MOST_TOKENS, min(out_features, in_features, scale * MOST_EIGH)
    x_TI = torch.rand(tokens, in_features, device=device)
    weight_OI = torch.rand(out_features, in_features, device=device)
    symmetric = (weight_OI[:size, :size] + weight_OI[:size, :size].mT).double()
    activations = x_TI.to(dtype)

    def product(of: torch.dtype) -> Callable[[], torch.Tensor]:
        left, right = x_TI.to(of), weight_OI.to(of)
        return lambda: F.linear(left, right)

    work = 2.0 * tokens * out_features * in_features
    measured = [
        _work_per_second(product(dtype), work),
        _work_per_second(product(torch.float32), work),
        _work_per_second(product(torch.float64), work),
        _work_per_second(lambda: torch.linalg.eigh(symmetric).eigenvectors, float(size**3)),
        _work_per_second(lambda: F.silu(activations), float(activations.numel())),
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
