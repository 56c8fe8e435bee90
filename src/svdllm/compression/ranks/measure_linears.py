"""Measures how long the linears of a model take on this machine, in every form.

What is measured are the modules that a compressed model is made of. A product with few tokens takes as long as reading
its matrix. A model reads every matrix once per step, so that none is in a cache when its turn comes. To reproduce this,
consecutive modules use matrices cut from more memory than caches hold.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from svdllm.common.progress import Reporter
from svdllm.compression.forms import FORMS
from svdllm.compression.ranks.linear_times import Curve, LinearTimes, Shape, ShapeTimes, shape_of
from svdllm.models.chosen import Chosen
from svdllm.models.linears import linear_shape, linears_of
from svdllm.models.low_rank import swap_linears
from svdllm.models.structure import Structure, Target

COLD_BYTES = 256 * 2**20
NUM_SIZES = 8  # of a shape in a form, from the least to the largest
SAMPLE_NS = 1_000_000  # shorter products are timed several at once
ROUNDS = range(5, 50)  # least and most; a round times every form and size once
SECONDS = 2.0  # after which a shape gets no more rounds than the least number


def measure_linears(
    skeleton: nn.Module,
    structure: Structure,
    *,
    forms: Collection[str],
    tokens: int,
    round_to: int,
    device: torch.device,
    dtype: torch.dtype,
    reporter: Reporter,
) -> LinearTimes:
    """Times every distinct shape of linear in a model, on matrices of random numbers.

    Args:
        skeleton: the model, of which only the shapes are read.
        structure: its targets, which are also timed in other forms than dense.
        forms: names of these forms; sizes are multiples of ``round_to``.
        tokens: rows of the inputs; 1 is the decoding of one text.
        device: runs the products.
        dtype: of inputs and matrices.
        reporter: is told about progress.
    """
    names = {name for target in structure.targets for name in target.linears}
    others = [module_shape(module) for name, module in linears_of(skeleton) if name not in names]
    by_shape: dict[Shape, list[Target]] = {shape: [] for shape in others}
    for target in structure.targets:
        by_shape.setdefault(shape_of(target), []).append(target)
    watch = _Watch(by_shape, tokens, device, dtype)
    measured = {}
    with reporter.stage("time linears", len(by_shape)), torch.inference_mode():
        for shape, targets in by_shape.items():
            measured[shape] = watch.times(shape, targets, measured_sizes(targets, forms, round_to))
            reporter.advance(len(measured), len(by_shape))
    return LinearTimes(
        tokens=tokens,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        outside=sum(measured[shape].dense for shape in others),
        shapes=list(measured.values()),
    )


def module_shape(module: nn.Module) -> Shape:
    return Shape(*linear_shape(module), isinstance(module, Conv1D))


def measured_sizes(targets: Collection[Target], forms: Iterable[str], round_to: int) -> dict[str, list[int]]:
    """At most ``NUM_SIZES`` sizes of every form that a target of one shape can have, evenly spread."""
    measured = {}
    for form in forms:
        sizes = max((FORMS[form].sizes(target, round_to) for target in targets), key=len, default=())
        if sizes:
            places = np.linspace(0, len(sizes) - 1, min(NUM_SIZES, len(sizes))).round().astype(int)
            measured[form] = [sizes[at] for at in places]
    return measured


def work_bytes(targets: Iterable[Target], shapes: Collection[tuple[int, int]], tokens: int, dtype: torch.dtype) -> int:
    """Bytes of memory that the measurement takes; ``shapes`` are the (out, in) of all linears.

    A packed linear holds its input or its output several times at once: gathered, and in parts.
    """
    matrices = max(COLD_BYTES, *(rows * columns * dtype.itemsize for rows, columns in shapes))
    dense = max(rows + columns for rows, columns in shapes)
    packed = max((3 * target.out_features + 2 * target.in_features for target in targets), default=0)
    return matrices + tokens * max(dense, packed) * dtype.itemsize


class _Watch:
    """Times modules with matrices that are not in a cache."""

    def __init__(self, shapes: Iterable[Shape], tokens: int, device: torch.device, dtype: torch.dtype):
        self.tokens, self.device, self.dtype = tokens, device, dtype
        largest = max(shape.out_features * shape.in_features for shape in shapes)
        block = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02
        repeats = -(-max(COLD_BYTES // dtype.itemsize, largest) // len(block))
        self._numbers = block.to(device, dtype).repeat(repeats)
        self._used = 0

    def times(self, shape: Shape, targets: Sequence[Target], sizes: Mapping[str, Sequence[int]]) -> ShapeTimes:
        """Medians over rounds, so that other processes slow down all forms alike.

        Args:
            targets: of this shape; none for a linear that stays dense.
            sizes: form -> sizes, ascending.
        """
        options = [None, *(Chosen(form, size) for form, some in sizes.items() for size in some)]
        linears = {chosen: [self._linear(shape, targets, chosen)] for chosen in options}
        for chosen, found in linears.items():
            taken = min(self._sample(shape, found) for _ in range(2))
            count = max(1, min(64, int(SAMPLE_NS / taken)))
            found += [self._linear(shape, targets, chosen) for _ in range(count - 1)]
        samples: dict[Chosen | None, list[float]] = {chosen: [] for chosen in options}
        started = time.monotonic()
        while len(samples[None]) < ROUNDS.start or (
            len(samples[None]) < ROUNDS.stop and time.monotonic() - started < SECONDS
        ):
            for chosen, found in linears.items():
                samples[chosen].append(self._sample(shape, found))
        curves = {
            form: Curve(list(some), isotonic([median(samples[Chosen(form, size)]) for size in some]))
            for form, some in sizes.items()
        }
        return ShapeTimes(shape, round(median(samples[None])), curves)

    def _sample(self, shape: Shape, linears: Sequence[nn.Module]) -> float:
        """Mean nanoseconds of a linear, over several of one form and size in a row."""
        for linear in linears:
            self._fill(linear)
        x = torch.ones(self.tokens, _num_inputs(linears[0], shape), device=self.device, dtype=self.dtype)
        if self.device.type != "cuda":
            started = time.perf_counter_ns()
            _run(linears, x)
            return (time.perf_counter_ns() - started) / len(linears)
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            _run(linears, x)
            end.record()
            end.synchronize()
        return start.elapsed_time(end) * 1e6 / len(linears)

    def _linear(self, shape: Shape, targets: Sequence[Target], chosen: Chosen | None) -> nn.Module:
        """A linear in a form, without weights; the orders of packed ones are random."""
        rows, columns = shape.out_features, shape.in_features
        with torch.device("meta"):
            dense = Conv1D(rows, columns) if shape.is_conv1d else nn.Linear(columns, rows, bias=False)
        parent = nn.ModuleDict({"linear": dense})
        if chosen is not None:
            swap_linears(parent, {"linear": FORMS[chosen.form].entry(targets[0], targets[0].name, chosen.size)})
        linear = parent["linear"]
        for name, order in linear.named_buffers():
            permuted = torch.randperm(len(order), generator=torch.Generator().manual_seed(0))
            linear.register_buffer(name, permuted.to(self.device, order.dtype))
        return linear

    def _fill(self, linear: nn.Module) -> None:
        for module in linear.modules():
            for name, parameter in module.named_parameters(recurse=False):
                module.register_parameter(name, nn.Parameter(self._cut(parameter.shape), requires_grad=False))

    def _cut(self, shape: Sequence[int]) -> Tensor:
        """Cuts the next tensor, from the start of a cache line. Starts again when the numbers are used up."""
        start, length = -(-self._used // 64) * 64, prod(shape)
        if start + length > len(self._numbers):
            start = 0
        self._used = start + length
        return self._numbers[start : self._used].view(*shape)


def _num_inputs(linear: nn.Module, shape: Shape) -> int:
    """Inputs of a linear of a shape in any form; a narrow one may have fewer."""
    return linear_shape(linear)[1] if isinstance(linear, (nn.Linear, Conv1D)) else shape.in_features


def _run(linears: Iterable[nn.Module], x: Tensor) -> None:
    for linear in linears:
        linear(x)


def isotonic(values: Sequence[float]) -> list[int]:
    """Makes times non-decreasing: the mean of the smallest such sequence above them and the largest below."""
    above = np.maximum.accumulate(values)
    below = np.minimum.accumulate(values[::-1])[::-1]
    return ((above + below) / 2).round().astype(int).tolist()
