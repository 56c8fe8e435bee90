"""Corrections of low rank beside a matrix in few bits."""

from __future__ import annotations

import pytest
import torch

from svdllm.compression.math.correction import corrected, squared_error
from svdllm.compression.math.rounding import round_rows


def _problem(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    inputs, gradients = torch.randn(200, 32, generator=generator), torch.randn(200, 24, generator=generator)
    inputs, gradients = (
        x.double() @ torch.randn(x.shape[1], x.shape[1], generator=generator).double() for x in (inputs, gradients)
    )
    return torch.randn(24, 32, generator=generator).double(), inputs.mT @ inputs, gradients.mT @ gradients


def _round(gram):
    return lambda weight: round_rows(weight, gram, torch.full((24,), 4.0), 16, torch.float32)


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_the_correction_is_the_best_of_its_rank_for_what_is_left(rank: int):
    weight, gram, left = _problem()
    found = corrected(weight, gram, left, rank, _round(gram), turns=1)
    rest = weight - found.rounded.matrix.double()
    root_in, root_out = torch.linalg.cholesky(gram), torch.linalg.cholesky(left).mT
    singular = torch.linalg.svdvals(root_out @ rest @ root_in)
    error = squared_error(rest - found.u_OR @ found.v_RI, gram, left)
    assert error == pytest.approx(float(singular[rank:].square().sum()), rel=1e-8)


def test_turns_never_make_it_worse_and_bits_alone_are_worse():
    weight, gram, left = _problem(1)
    errors = []
    for turns in (1, 2, 3):
        found = corrected(weight, gram, left, 6, _round(gram), turns=turns)
        made = found.rounded.matrix.double() + found.u_OR @ found.v_RI
        errors.append(squared_error(weight - made, gram, left))
    assert errors[0] >= errors[1] >= errors[2]
    alone = squared_error(weight - _round(gram)(weight).matrix.double(), gram, left)
    assert errors[0] < 0.8 * alone


def test_by_hand_without_metrics():
    error = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    assert squared_error(error, None, None) == 14
    assert squared_error(error, torch.tensor([2.0, 1.0]), None) == 15
    assert squared_error(error, None, torch.diag(torch.tensor([1.0, 2.0]))) == 5 + 18
