"""Sums over tokens whose bytes do not depend on how many processes share the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from svdllm.common.processes import Processes

# Numbers that one process hands to the others at once.
PIECE = 2**20


class Total:
    """A float64 sum over tokens, which come in shards.

    The tokens of a shard are added in their order, and the sums of the shards by ``fold`` in the order of the shards.
    Tokens that were not folded count as one more shard.
    """

    def __init__(self, *shape: int, device: torch.device | str = "cpu"):
        self._shape, self._device = shape, device
        self._shard: Tensor | None = None
        self._folded: Tensor | None = None

    @property
    def shard(self) -> Tensor:
        """The sum of the shard at hand, to which its tokens are added in place."""
        if self._shard is None:
            self._shard = self._zeros()
        return self._shard

    @property
    def is_folded(self) -> bool:
        """Whether nothing was added since the last ``fold``."""
        return self._shard is None

    def fold(self, processes: Processes) -> None:
        """Adds the shards that the processes have at hand, in the order of the processes. All have the sum then."""
        if self._folded is None and processes.count == 1:
            self._folded, self._shard = self.shard, None
            return
        self._folded = self._zeros() if self._folded is None else self._folded
        rows = max(1, PIECE // max(1, self._folded[0].numel()))
        for total, own in zip(self._folded.split(rows), self.shard.split(rows), strict=True):
            for piece in processes.in_turn(own):
                total += piece
        self._shard = None

    def value(self) -> Tensor:
        """The sum of all shards."""
        if self._folded is None:
            return self.shard
        return self._folded if self._shard is None else self._folded + self._shard

    def _zeros(self) -> Tensor:
        return torch.zeros(self._shape, dtype=torch.float64, device=self._device)


class Totals:
    """Something that is made of several totals."""

    _totals: Iterable[Total]

    @property
    def is_folded(self) -> bool:
        """Whether nothing was added since the last ``fold``."""
        return all(total.is_folded for total in self._totals)

    def fold(self, processes: Processes) -> None:
        """Adds the shards that the processes have at hand; all have the sums then."""
        for total in self._totals:
            total.fold(processes)


def fold_each(kept: dict[str, Any], make: Callable[[str], Any], processes: Processes) -> None:
    """Folds everything to which some process has added tokens of its shard.

    Args:
        kept: by name; gets what only other processes have.
        make: makes what is missing, by its name.
    """
    found = processes.gather([name for name, totals in kept.items() if not totals.is_folded])
    for name in dict.fromkeys(name for names in found for name in names):
        if name not in kept:
            kept[name] = make(name)
        kept[name].fold(processes)
