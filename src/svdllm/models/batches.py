"""Deals the batches of a text to the processes that share a walk.

Batch ``b`` belongs to shard ``b % SHARDS``, and shard ``s`` to process ``s % count``. Sums over batches are made shard
by shard, and the shards are added in their order: the same sum, to the last bit, for any number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from svdllm.common.errors import InputError
from svdllm.common.processes import Processes

SHARDS = 8


@dataclass(frozen=True)
class Batches:
    """The batches of one process.

    places: the windows of every batch, in the text.
    numbers: of the batches, in the text.
    rounds: the batches between two sums over the processes, by their numbers here. Every process has as many rounds.
    """

    places: list[range]
    numbers: list[int]
    rounds: list[range]

    @classmethod
    def of(cls, num_windows: int, size: int) -> Batches:
        """All batches of a text, in order, in one round."""
        places = _places(num_windows, size)
        return cls(places, list(range(len(places))), [range(len(places))])

    @classmethod
    def dealt(cls, num_windows: int, size: int, processes: Processes) -> Batches:
        """The batches of a process, shard by shard.

        Raises:
            InputError: there are fewer batches, or fewer shards, than processes.
        """
        places = _places(num_windows, size)
        require_batches(len(places), processes.count)
        numbers: list[int] = []
        rounds: list[range] = []
        for first in range(0, min(SHARDS, len(places)), processes.count):
            shard = range(first + processes.rank, len(places), SHARDS) if first + processes.rank < SHARDS else range(0)
            rounds.append(range(len(numbers), len(numbers) + len(shard)))
            numbers += shard
        return cls([places[number] for number in numbers], numbers, rounds)

    @property
    def windows(self) -> list[int]:
        """The places in the text of all windows, a batch after the other."""
        return [window for place in self.places for window in place]

    @property
    def slices(self) -> list[slice]:
        """The windows of every batch, among the windows of this process."""
        slices: list[slice] = []
        for place in self.places:
            start = slices[-1].stop if slices else 0
            slices.append(slice(start, start + len(place)))
        return slices

    def where(self, batch: int) -> str:
        """Names a batch in a message, by its place in the text."""
        place = self.places[batch]
        return f"batch {self.numbers[batch]}, windows {place.start} to {place.stop - 1},"


def windows_per_batch(batch_tokens: int, seqlen: int) -> int:
    """Windows that run through a block at once; one at least, however long."""
    return max(1, batch_tokens // seqlen)


def require_batches(num_batches: int, num_processes: int) -> None:
    """Raises InputError if a text has fewer batches, or fewer shards, than there are processes."""
    most = min(SHARDS, num_batches)
    if num_processes > most:
        batches = "1 batch" if num_batches == 1 else f"{num_batches} batches"
        advice = ", or lower --batch-tokens" if num_batches < SHARDS else ""
        raise InputError(
            f"{num_processes} processes cannot share {batches} of calibration text: expected at most {most}. "
            f"Start fewer processes{advice}."
        )


def share_of_largest(num_batches: int, num_processes: int) -> float:
    """The share of the batches that the process with most of them has."""
    if num_batches == 0:
        return 1.0
    shards = [len(range(shard, num_batches, SHARDS)) for shard in range(SHARDS)]
    return max(sum(shards[rank::num_processes]) for rank in range(num_processes)) / num_batches


def _places(num_windows: int, size: int) -> list[range]:
    return [range(start, min(start + size, num_windows)) for start in range(0, num_windows, size)]
