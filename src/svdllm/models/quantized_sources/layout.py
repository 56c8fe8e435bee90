"""Finds the tensors that a quantised weight is stored as, and computes the weight when it is read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from svdllm.models.converted import Stored

FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
Parts = Mapping[str, Stored]  # name of a part, such as "scale" -> the stored tensor
Values = Mapping[str, Tensor]


class Layout(NamedTuple):
    """The names of the tensors that one weight is stored as.

    Args:
        mark: how the name of its main tensor ends.
        target: what stands there in the name of the dense weight.
        dtypes: of the main tensor.
        parts: the other tensors -> how their names may end.
        optional: the parts that may be missing.
        reserved: how the names of no tensors but parts may end.
    """

    mark: str
    target: str
    dtypes: Collection[torch.dtype]
    parts: Mapping[str, Sequence[str]]
    optional: Collection[str] = ()
    reserved: Sequence[str] = ()


class Method(Protocol):
    """A method of quantisation: what it stores, and the weights that this stands for.

    ``shape`` and ``weight`` get the name of the dense weight and its parts, of which ``main`` is the one that
    ``Layout.mark`` names.
    """

    @property
    def title(self) -> str: ...

    @property
    def layouts(self) -> Sequence[Layout]: ...

    @property
    def of_activations(self) -> Sequence[str]:
        """How the names of tensors end that only activations are quantised by."""
        ...

    def shape(self, name: str, parts: Parts) -> tuple[int, ...]:
        """The shape of the dense weight. Raises ValueError if the parts do not fit together."""
        ...

    def weight(self, name: str, values: Values) -> Tensor:
        """The dense weight, in a dtype that holds it at least as well as 16 bits."""
        ...


@dataclass(frozen=True)
class DequantizedTensor:
    """A dense weight that is computed from its stored parts whenever it is read."""

    method: Method
    name: str
    parts: Parts
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        return self._weight({part: stored.read() for part, stored in self.parts.items()})

    def read_part(self, index: int) -> Tensor:
        """Computes one of the weights that are stacked in this one, from its own slices if all parts are stacked."""
        count = self.shape[0]
        if any(len(stored.shape) < 2 or stored.shape[0] != count for stored in self.parts.values()):
            return self.read()[index]
        return self._weight({part: stored.read_part(index)[None] for part, stored in self.parts.items()})[0]

    def _weight(self, values: Values) -> Tensor:
        return self.method.weight(self.name, values).to(self.dtype).contiguous()


def dequantized(stored: Mapping[str, Stored], method: Method, dtype: torch.dtype) -> dict[str, Stored]:
    """Replaces the parts of quantised weights by the dense weights, under their names; other tensors stay.

    Raises:
        ValueError: parts of a weight are missing or do not fit together; names the weight.
    """
    weights: dict[str, Stored] = {}
    used: set[str] = set()
    for key, layout in _main_tensors(stored, method):
        name = key.removesuffix(layout.mark) + layout.target
        places = _places(key, layout, stored)
        if missing := [part for part in layout.parts if part not in places and part not in layout.optional]:
            ends = " or ".join(layout.parts[missing[0]])
            raise ValueError(f"{key} is stored without its {missing[0]} (a tensor whose name ends with {ends})")
        parts = {"main": stored[key]} | {part: stored[place] for part, place in places.items()}
        try:
            shape = method.shape(name, parts)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        weights[name] = DequantizedTensor(method, name, parts, shape, dtype)
        used |= {key, *places.values()}
    rest = {key: tensor for key, tensor in stored.items() if key not in used}
    reserved = tuple(ending for layout in method.layouts for ending in layout.reserved)
    if left := [key for key in rest if key.endswith(reserved)]:
        raise ValueError(f"{left[0]} belongs to no quantised weight, so the model computes more than products of them")
    endings = tuple(method.of_activations)
    return {key: tensor for key, tensor in rest.items() if not key.endswith(endings)} | weights


def _main_tensors(stored: Mapping[str, Stored], method: Method) -> Iterator[tuple[str, Layout]]:
    """Yields the main tensor of every quantised weight, with the layout whose parts are all there, or the first."""
    for key, tensor in stored.items():
        fitting = [layout for layout in method.layouts if key.endswith(layout.mark) and tensor.dtype in layout.dtypes]
        if fitting:
            complete = [one for one in fitting if set(_places(key, one, stored)) >= set(one.parts) - set(one.optional)]
            yield key, (complete or fitting)[0]


def _places(key: str, layout: Layout, stored: Mapping[str, Stored]) -> dict[str, str]:
    """Part -> the stored tensor that it is; parts that are missing are not in it."""
    stem = key.removesuffix(layout.mark)
    return {
        part: place
        for part, endings in layout.parts.items()
        for place in [next((stem + ending for ending in endings if stem + ending in stored), None)]
        if place is not None
    }


def require_shape(stored: Stored, expected: Sequence[tuple[int, ...]], what: str) -> None:
    """Raises ValueError unless a stored tensor has one of the expected shapes."""
    if stored.shape not in expected:
        raise ValueError(f"{what}: found shape {stored.shape}, expected {' or '.join(map(str, expected))}")


def exactly(number: int, divisor: int, what: str) -> int:
    """Divides without a rest. Raises ValueError if one is left."""
    if divisor < 1 or number % divisor:
        raise ValueError(f"{what} is {number}, expected a multiple of {divisor}")
    return number // divisor
