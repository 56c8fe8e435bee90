"""Measures how long the linears of a model take on this machine, dense and factorised: the unit of a budget of time.

A product with few tokens takes as long as reading its matrix. A model reads every matrix once per step, so that none
is in a cache when its turn comes. To reproduce this, consecutive products use matrices cut from more memory than
caches hold.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from svdllm.common.progress import Reporter
from svdllm.models.linears import linear_shape, linears_of
from svdllm.models.structure import Structure, Target

COLD_BYTES = 256 * 2**20
NUM_RANKS = 12  # of a shape, from the least to break-even
SAMPLE_NS = 1_000_000  # shorter products are timed several at once
ROUNDS = range(5, 50)  # least and most; a round times every rank once
SECONDS = 2.0  # after which a shape gets no more rounds than the least number


class Shape(NamedTuple):
    """The properties of a linear that its time depends on; GPT-2's ``Conv1D`` keeps its weight as (in, out)."""

    out_features: int
    in_features: int
    is_conv1d: bool


@dataclass(frozen=True)
class ShapeTimes:
    """Times of one shape, in nanoseconds: of the dense product, and of the two products at each measured rank.

    Ranks ascend.
    """

    shape: Shape
    dense: int
    ranks: Sequence[int]
    factored: Sequence[int]


@dataclass(frozen=True)
class Speed:
    """Predicted time of all linears of a model together, for ``tokens`` tokens at once."""

    tokens: int
    device: str
    dtype: str
    dense_ns: int
    compressed_ns: int
    speedup: float


@dataclass(frozen=True, kw_only=True)
class LinearTimes:
    """Measured times of a model's linears for ``tokens`` tokens at once, in nanoseconds.

    ``outside`` is the time of all linears that are not targets, such as the head. ``threads`` is the number of CPU
    threads.
    """

    tokens: int
    device: str
    dtype: str
    threads: int
    outside: int
    shapes: Sequence[ShapeTimes]

    def of(self, target: Target, rank: int | None) -> int:
        """Time of a target: dense if ``rank`` is None, else of its factors, interpolated between measured ranks."""
        times = next(times for times in self.shapes if times.shape == shape_of(target))
        return times.dense if rank is None else round(float(np.interp(rank, times.ranks, times.factored)))

    def total(self, targets: Iterable[Target], ranks: Mapping[str, int]) -> int:
        """Time of all linears; targets without a rank are dense."""
        return self.outside + sum(self.of(target, ranks.get(target.name)) for target in targets)

    def speed(self, targets: Sequence[Target], ranks: Mapping[str, int]) -> Speed:
        dense, compressed = self.total(targets, {}), self.total(targets, ranks)
        return Speed(self.tokens, self.device, self.dtype, dense, compressed, dense / compressed)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, file: Path) -> LinearTimes:
        content = json.loads(file.read_text(encoding="utf-8"))
        shapes = [ShapeTimes(**row | {"shape": Shape(*row["shape"])}) for row in content.pop("shapes")]
        return cls(**content, shapes=shapes)


def shape_of(target: Target) -> Shape:
    return Shape(target.out_features, target.in_features, target.is_conv1d)


def measure_linears(
    skeleton: nn.Module,
    structure: Structure,
    *,
    tokens: int,
    round_to: int,
    device: torch.device,
    dtype: torch.dtype,
    reporter: Reporter,
) -> LinearTimes:
    """Times every distinct shape of linear in a model, on matrices of random numbers.

    Args:
        skeleton: the model, of which only the shapes are read.
        structure: its targets, which are also timed factorised, at multiples of ``round_to`` up to break-even.
        tokens: rows of the inputs; 1 is the decoding of one text.
        device: runs the products.
        dtype: of inputs and matrices.
        reporter: is told about progress.
    """
    names = {name for target in structure.targets for name in target.linears}
    others = [module_shape(module) for name, module in linears_of(skeleton) if name not in names]
    highest: dict[Shape, int] = dict.fromkeys(others, 0)
    for target in structure.targets:
        shape = shape_of(target)
        highest[shape] = max(highest.get(shape, 0), target.break_even_rank)
    watch = _Watch(highest, tokens, device, dtype)
    measured = {}
    with reporter.stage("time linears", len(highest)), torch.inference_mode():
        for shape, rank in highest.items():
            measured[shape] = watch.times(shape, measured_ranks(rank, round_to))
            reporter.advance(len(measured), len(highest))
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


def measured_ranks(highest: int, round_to: int) -> list[int]:
    """At most ``NUM_RANKS`` multiples of ``round_to`` up to ``highest``, evenly spread."""
    steps = highest // round_to
    spread = np.linspace(1, steps, min(NUM_RANKS, steps)).round().astype(int)
    return (spread * round_to).tolist()


def work_bytes(shapes: Iterable[tuple[int, int]], tokens: int, dtype: torch.dtype) -> int:
    """Bytes of memory that the measurement takes; ``shapes`` are the (out, in) of all linears."""
    return max(
        max(COLD_BYTES, rows * columns * dtype.itemsize) + tokens * (rows + columns) * dtype.itemsize
        for rows, columns in shapes
    )


class _Watch:
    """Times products with matrices that are not in a cache."""

    def __init__(self, shapes: Iterable[Shape], tokens: int, device: torch.device, dtype: torch.dtype):
        self.tokens, self.device, self.dtype = tokens, device, dtype
        largest = max(shape.out_features * shape.in_features for shape in shapes)
        block = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02
        repeats = -(-max(COLD_BYTES // dtype.itemsize, largest) // len(block))
        self._numbers = block.to(device, dtype).repeat(repeats)
        self._used = 0

    def times(self, shape: Shape, ranks: Sequence[int]) -> ShapeTimes:
        """Medians over rounds, so that other processes slow down dense and factorised products alike."""
        x = torch.ones(self.tokens, shape.in_features, device=self.device, dtype=self.dtype)
        options = (None, *ranks)
        first = {rank: min(self._sample(x, shape, rank, 1) for _ in range(2)) for rank in options}
        counts = {rank: max(1, min(64, int(SAMPLE_NS / taken))) for rank, taken in first.items()}
        samples: dict[int | None, list[float]] = {rank: [] for rank in options}
        started = time.monotonic()
        while len(samples[None]) < ROUNDS.start or (
            len(samples[None]) < ROUNDS.stop and time.monotonic() - started < SECONDS
        ):
            for rank in options:
                samples[rank].append(self._sample(x, shape, rank, counts[rank]))
        factored = isotonic([median(samples[rank]) for rank in ranks])
        return ShapeTimes(shape, round(median(samples[None])), ranks, factored)

    def _sample(self, x: Tensor, shape: Shape, rank: int | None, count: int) -> float:
        """Mean nanoseconds of a linear, over ``count`` of them in a row."""
        linears = [self._linear(shape, rank) for _ in range(count)]
        if self.device.type != "cuda":
            started = time.perf_counter_ns()
            _multiply(x, linears)
            return (time.perf_counter_ns() - started) / count
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            _multiply(x, linears)
            end.record()
            end.synchronize()
        return start.elapsed_time(end) * 1e6 / count

    def _linear(self, shape: Shape, rank: int | None) -> list[Tensor]:
        """The matrices of a linear: one if it is dense, two if factorised."""
        rows, columns, is_conv1d = shape
        if rank is not None:
            return [self._cut(rank, columns), self._cut(rows, rank)]
        return [self._cut(columns, rows).mT if is_conv1d else self._cut(rows, columns)]

    def _cut(self, rows: int, columns: int) -> Tensor:
        """Cuts the next matrix, from the start of a cache line. Starts again when the numbers are used up."""
        start = -(-self._used // 64) * 64
        if start + rows * columns > len(self._numbers):
            start = 0
        self._used = start + rows * columns
        return self._numbers[start : self._used].view(rows, columns)


def _multiply(x: Tensor, linears: Iterable[Sequence[Tensor]]) -> None:
    for matrices in linears:
        product = x
        for matrix in matrices:
            product = F.linear(product, matrix)


def isotonic(values: Sequence[float]) -> list[int]:
    """Makes times non-decreasing in rank: the mean of the smallest such sequence above them and the largest below."""
    above = np.maximum.accumulate(values)
    below = np.minimum.accumulate(values[::-1])[::-1]
    return ((above + below) / 2).round().astype(int).tolist()
