"""The processes that share a run, as torchrun or accelerate launch starts them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return num_processes() == 1 or int(os.environ.get("RANK", "0")) == 0


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def num_local_processes() -> int:
    """How many of the processes run on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", num_processes()))


def shared_out(costs: Sequence[float], count: int) -> list[list[int]]:
    """The pieces of work of each process: the dearest first, each to the process that has least to do.

    Args:
        costs: of every piece, in any unit.
        count: of the processes.
    """
    loads = [0.0] * count
    pieces: list[list[int]] = [[] for _ in range(count)]
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        least = loads.index(min(loads))
        loads[least] += costs[piece]
        pieces[least].append(piece)
    return [sorted(own) for own in pieces]


class Processes:
    """One process, which shares its run with no other; the base of ``ConnectedProcesses``.

    All processes call the same methods in the same order, but for ``stopped``.
    """

    rank, count = 0, 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def gather(self, data: Any) -> list[Any]:
        """What every process has, in their order. It is written as JSON on the way, so that tuples become lists."""
        return [data]

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, which is written as JSON on the way."""
        return self.gather(make() if self.is_first else None)[0]

    def first_then_others(self, act: Callable[[], T]) -> T:
        """Every process acts, the first one before the others."""
        if not self.is_first:
            self.wait()
        result = act()
        if self.is_first:
            self.wait()
        return result

    def wait(self) -> None:
        """Returns when all processes have come here."""
        self.gather(None)

    def in_turn(self, tensor: Tensor) -> Iterator[Tensor]:
        """Yields the tensors that the processes hand in, in their order; all have one shape and dtype."""
        yield tensor

    def merged(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """The tensors that all processes hand in, by two names, the first of which only one process has."""
        return {name: dict(own) for name, own in tensors.items()}

    def require_shared(self, folder: Path) -> None:
        """Raises InputError unless all processes find the same folder at a path, which the first one has made."""

    def stopped(self, error: Exception) -> None:
        """Tells the other processes of an error, and returns when they have stopped or do not answer."""

    def own(self, costs: Sequence[float]) -> list[int]:
        """The pieces of work that fall to this process; see ``shared_out``."""
        return shared_out(costs, self.count)[self.rank]


ALONE = Processes()
