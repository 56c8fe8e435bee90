"""Error feedback by blocks, against the best correction of the columns that are left, by least squares."""

from __future__ import annotations

import pytest
import torch

from gram_problems import damped, problem
from svdllm.compression.math.few_bits.feedback import quantise_blocks
from svdllm.compression.math.rounding import DAMPING, feedback_factor


@pytest.mark.parametrize("width", [1, 4, 8])
def test_columns_after_a_block_become_the_best_correction_of_its_error(width: int):
    weight, gram = problem(5, 150)  # more than a panel
    metric, expected = damped(gram), weight.clone()
    for start in range(0, 150, width):
        stop = min(start + width, 150)
        before = expected.clone()
        expected[:, start:stop] = expected[:, start:stop].round()
        error = before[:, start:stop] - expected[:, start:stop]
        cross, rest = metric[start:stop, stop:], metric[stop:, stop:]
        expected[:, stop:] += torch.linalg.solve(rest, (error @ cross).mT).mT if stop < 150 else 0
    found = quantise_blocks(weight, feedback_factor(gram, DAMPING), width, lambda columns, _: columns.round())
    assert (found == expected).all()


def test_the_places_of_a_block_are_told():
    weight, gram = problem(3, 20)
    places = []

    def keep(columns: torch.Tensor, block: slice) -> torch.Tensor:
        places.append((block.start, block.stop))
        return columns

    assert torch.equal(quantise_blocks(weight, feedback_factor(gram, DAMPING), 8, keep), weight)
    assert places == [(0, 8), (8, 16), (16, 20)]
