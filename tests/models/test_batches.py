"""The batches of a text are dealt so that every sum over shards is the same for any number of processes."""

from __future__ import annotations

import pytest

from svdllm.common.errors import InputError
from svdllm.common.processes import Processes, shared_out
from svdllm.models.batches import SHARDS, Batches, share_of_largest


class One(Processes):
    def __init__(self, rank: int, count: int):
        self.rank, self.count = rank, count


def shards_of(count: int, windows: int, size: int) -> list[list[int]]:
    """The batches of every shard, in the order in which shards are added, by their places in the text."""
    dealt = [Batches.dealt(windows, size, One(rank, count)) for rank in range(count)]
    assert len({len(own.rounds) for own in dealt}) == 1
    rounds = range(len(dealt[0].rounds))
    shards = [[own.numbers[batch] for batch in own.rounds[number]] for number in rounds for own in dealt]
    return [shard for shard in shards if shard]


@pytest.mark.parametrize(("windows", "size"), [(8, 1), (29, 3), (64, 2), (5, 1), (100, 7)])
def test_the_shards_are_the_same_for_any_number_of_processes(windows: int, size: int) -> None:
    num_batches = -(-windows // size)
    alone = shards_of(1, windows, size)
    assert sorted(batch for shard in alone for batch in shard) == list(range(num_batches))
    assert len(alone) == min(SHARDS, num_batches)
    for count in range(2, min(SHARDS, num_batches) + 1):
        assert shards_of(count, windows, size) == alone


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_window_belongs_to_one_process(count: int) -> None:
    dealt = [Batches.dealt(29, 3, One(rank, count)) for rank in range(count)]
    assert sorted(window for own in dealt for window in own.windows) == list(range(29))
    for own in dealt:
        for place, part in zip(own.places, own.slices, strict=True):
            assert own.windows[part] == list(place)
    largest = max(len(own.numbers) for own in dealt)
    assert share_of_largest(10, count) == pytest.approx(largest / 10)


def test_by_hand() -> None:
    """Ten batches in eight shards: the first two have two batches; process 1 of 3 has shards 1, 4 and 7."""
    dealt = Batches.dealt(10, 1, One(1, 3))
    assert dealt.numbers == [1, 9, 4, 7]
    assert dealt.rounds == [range(2), range(2, 3), range(3, 4)]
    assert Batches.dealt(10, 1, One(2, 3)).rounds == [range(1), range(1, 2), range(2, 2)]
    assert dealt.where(1) == "batch 9, windows 9 to 9,"


@pytest.mark.parametrize(
    ("windows", "count", "message"),
    [
        (2, 3, "3 processes cannot share 2 batches of calibration text: expected at most 2. Start fewer processes, or"),
        (
            100,
            9,
            "9 processes cannot share 100 batches of calibration text: expected at most 8. Start fewer processes.",
        ),
    ],
)
def test_too_many_processes(windows: int, count: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Batches.dealt(windows, 1, One(0, count))


def test_work_is_shared_by_cost() -> None:
    """Seven, five, four and four pieces: 7 + 4 and 5 + 4, in their order."""
    assert shared_out([4, 7, 4, 5], 2) == [[1, 2], [0, 3]]
    assert shared_out([1.0], 3) == [[0], [], []]
