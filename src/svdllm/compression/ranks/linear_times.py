"""The times of a model's linears in every form, as measured on one machine: the unit of a budget of time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from svdllm.models.chosen import Chosen, Forms
from svdllm.models.structure import Target


class Shape(NamedTuple):
    """The properties of a linear that its times depend on.

    ``inner`` is the side, ``in`` or ``out``, on which the inner features of an MLP that can be narrowed lie, and
    ``copies`` how many times it holds them. GPT-2's ``Conv1D`` keeps its weight as (in, out).
    """

    out_features: int
    in_features: int
    is_conv1d: bool
    inner: str | None = None
    copies: int = 1


@dataclass(frozen=True)
class Curve:
    """Times of a shape in one form, in nanoseconds, at sizes that ascend. No larger size takes less."""

    sizes: Sequence[int]
    times: Sequence[int]


@dataclass(frozen=True)
class ShapeTimes:
    """Times of one shape: of the dense matrix, in nanoseconds, and in every form that it may have."""

    shape: Shape
    dense: int
    forms: Mapping[str, Curve]

    def of(self, chosen: Chosen | None) -> int:
        """Time of the dense matrix (None), or in a form, interpolated between measured sizes."""
        if chosen is None:
            return self.dense
        curve = self.forms[chosen.form]
        return round(float(np.interp(chosen.size, curve.sizes, curve.times)))


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

    def of(self, target: Target, chosen: Chosen | None) -> int:
        """Time of a target in a form that was measured; None is its dense matrix."""
        return self._of(shape_of(target), chosen)

    @cached_property
    def _of(self) -> Callable[[Shape, Chosen | None], int]:
        rows = {row.shape: row for row in self.shapes}
        return cache(lambda shape, chosen: rows[shape].of(chosen))

    def total(self, targets: Iterable[Target], forms: Forms) -> int:
        """Time of all linears; targets without a form are dense."""
        return self.outside + sum(self.of(target, forms.get(target.name)) for target in targets)

    def speed(self, targets: Sequence[Target], forms: Forms) -> Speed:
        dense, compressed = self.total(targets, {}), self.total(targets, forms)
        return Speed(self.tokens, self.device, self.dtype, dense, compressed, dense / compressed)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, file: Path) -> LinearTimes:
        content = json.loads(file.read_text(encoding="utf-8"))
        shapes = [
            ShapeTimes(Shape(*row["shape"]), row["dense"], {name: Curve(**at) for name, at in row["forms"].items()})
            for row in content.pop("shapes")
        ]
        return cls(**content, shapes=shapes)


def shape_of(target: Target) -> Shape:
    sizes = target.out_features, target.in_features, target.is_conv1d
    return Shape(*sizes) if target.inner is None else Shape(*sizes, target.inner.side, target.inner.copies)
