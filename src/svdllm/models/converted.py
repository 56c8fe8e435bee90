"""Reads tensors that transformers joins or splits while it loads a model, such as one for all experts of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter


class Stored(Protocol):
    """A tensor that can be read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self) -> Tensor: ...

    def read_part(self, index: int) -> Tensor: ...


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        # A copy, so that the file is mapped only during this call: its pages count as resident memory.
        with safe_open(self.file, framework="pt") as file:
            return file.get_tensor(self.key).clone()

    def read_part(self, index: int) -> Tensor:
        """Reads one of the tensors that are stacked in this one."""
        with safe_open(self.file, framework="pt") as file:
            return file.get_slice(self.key)[index].clone()


@dataclass(frozen=True)
class Conversion:
    """A rule of transformers with the stored tensors that it makes tensors of the model from.

    Args:
        name: in the model, of the first tensor that it makes.
        sources: pattern of the rule, name of a tensor that it matches and the tensor, in the order of transformers.
    """

    model: PreTrainedModel
    rule: WeightConverter
    name: str
    sources: Sequence[tuple[str, str, Stored]]

    @cached_property
    def made(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Tensor that it makes -> shape and dtype, without reading any.

        Raises:
            ValueError and others: the tensors do not fit the rule; its words say how.
        """
        values = self._convert(lambda source: torch.empty(source.shape, dtype=source.dtype, device="meta"))
        return {name: (tuple(value.shape), value.dtype) for name, value in values.items()}

    def read(self, name: str) -> Tensor:
        """Reads the tensors, and makes one of them."""
        return self._convert(lambda source: source.read())[name].contiguous()

    def read_part(self, name: str, index: int) -> Tensor:
        """Makes one of the tensors that are stacked in a tensor, of the stored tensors of this index if it can."""
        shape, _ = self.made[name]
        parts = list(self._by_pattern.values())
        if any(len(sources) != shape[0] for sources in parts):
            return self.read(name)[index]
        single = replace(self, sources=[sources[index] for sources in parts])
        made = single._convert(lambda source: source.read())[name]
        return made[0] if made.shape == (1, *shape[1:]) else self.read(name)[index]

    @cached_property
    def _by_pattern(self) -> dict[str, list[tuple[str, str, Stored]]]:
        groups: dict[str, list[tuple[str, str, Stored]]] = {}
        for source in self.sources:
            groups.setdefault(source[0], []).append(source)
        return groups

    def _convert(self, read: Callable[[Stored], Tensor]) -> Mapping[str, Tensor]:
        rule = deepcopy(self.rule)  # it collects tensors
        for pattern, key, source in self.sources:
            rule.add_tensor(self.name, key, pattern, lambda source=source: read(source))  # type: ignore[arg-type]
        made = rule.convert(self.name, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class ConvertedTensor:
    """One tensor that a conversion makes."""

    conversion: Conversion
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.conversion.made[self.name][0]

    @property
    def dtype(self) -> torch.dtype:
        return self.conversion.made[self.name][1]

    def read(self) -> Tensor:
        return self.conversion.read(self.name)

    def read_part(self, index: int) -> Tensor:
        return self.conversion.read_part(self.name, index)


@dataclass(frozen=True)
class StoredPart:
    """The tensor of one expert in a stack of those of all."""

    stack: Stored
    index: int
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:][::-1] if self.transposed else self.stack.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        return self.stack.dtype

    def read(self) -> Tensor:
        part = self.stack.read_part(self.index)
        return (part.mT if self.transposed else part).contiguous()

    def read_part(self, index: int) -> Tensor:
        return self.read()[index]


def converted_tensors(conversions: Sequence[Conversion]) -> Iterator[tuple[str, ConvertedTensor]]:
    """Yields every tensor that some conversions make, by its name in the model."""
    for conversion in conversions:
        for name in conversion.made:
            yield name, ConvertedTensor(conversion, name)
