"""Rounding to few bits, against brute force and against rounding to nearest."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from svdllm.compression.math.rounding import (
    Rounded,
    round_rows,
    round_to_nearest,
    round_with_feedback,
    searched_scales,
    squared_errors,
)


def _problem(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=dtype)
    inputs = torch.randn(4 * columns, columns, generator=generator, dtype=dtype) @ mixing
    return torch.randn(rows, columns, generator=generator, dtype=dtype), inputs.mT @ inputs


def _halves(rows: int, bits: int) -> torch.Tensor:
    return torch.full((rows,), 2.0 ** (bits - 1))


def _brute_force(weight_I, gram_II, scale: float, codes: range) -> float:
    every = torch.tensor(list(product(codes, repeat=len(weight_I))), dtype=weight_I.dtype)
    error = weight_I - scale * every
    return float(((error @ gram_II) * error).sum(1).min())


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_four_columns_are_between_the_best_codes_and_the_nearest(bits: int, seed: int):
    weight, gram = _problem(6, 4, seed)
    half = _halves(6, bits)
    scales = searched_scales(weight, half, 4, None, torch.float64)
    found = squared_errors(weight, round_with_feedback(weight, gram, half, scales, damping=1e-9).matrix, gram)
    nearest = squared_errors(weight, round_to_nearest(weight, half, scales).matrix, gram)
    codes = range(-(2 ** (bits - 1)), 2 ** (bits - 1))
    best = torch.tensor(
        [_brute_force(w, gram, float(s), codes) for w, s in zip(weight, scales, strict=True)], dtype=weight.dtype
    )
    assert (found >= best * (1 - 1e-9)).all()
    assert (found <= nearest).all()
    assert found.sum() - best.sum() < 0.9 * (nearest.sum() - best.sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_row_is_worse_than_nearest_and_the_whole_is_better(bits: int):
    weight, gram = _problem(24, 64, dtype=torch.float32)
    half = _halves(24, bits)
    scales = searched_scales(weight, half, 16, gram.diagonal(), torch.bfloat16)
    nearest = squared_errors(weight, round_to_nearest(weight, half, scales).matrix, gram)
    found = squared_errors(weight, round_with_feedback(weight, gram, half, scales).matrix, gram)
    assert (found <= nearest).all()
    assert found.sum() < 0.7 * nearest.sum()


def test_without_correlations_feedback_changes_nothing():
    weight, _ = _problem(5, 32)
    half, gram = _halves(5, 3), torch.diag(torch.rand(32, dtype=torch.float64) + 0.5)
    scales = searched_scales(weight, half, 8, None, torch.float64)
    nearest = round_to_nearest(weight, half, scales)
    assert torch.equal(round_with_feedback(weight, gram, half, scales).codes_OI, nearest.codes_OI)


def test_the_order_of_the_inputs_does_not_matter_where_a_row_is_one_group():
    weight, gram = _problem(5, 12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    found = round_rows(weight, gram, _halves(5, 3), 12, torch.float64)
    permuted = round_rows(weight[:, order], gram[order][:, order], _halves(5, 3), 12, torch.float64)
    assert torch.equal(found.codes_OI[:, order], permuted.codes_OI)


def test_rows_in_several_numbers_of_bits_are_those_of_each_alone():
    weight, gram = _problem(8, 32)
    together = round_rows(
        torch.cat([weight, weight]), gram, torch.cat([_halves(8, 2), _halves(8, 4)]), 8, torch.float64
    )
    for rows, bits in ((slice(0, 8), 2), (slice(8, 16), 4)):
        alone = round_rows(weight, gram, _halves(8, bits), 8, torch.float64)
        assert torch.equal(together.codes_OI[rows], alone.codes_OI)
        torch.testing.assert_close(together.scales_OG[rows], alone.scales_OG)


@pytest.mark.parametrize("bits", [2, 4])
def test_searched_scales_lose_no_more_than_those_that_cover_everything(bits: int):
    weight, _ = _problem(16, 64)
    half = _halves(16, bits)
    largest = weight.unflatten(1, (-1, 16)).abs().amax(2)
    covering = round_to_nearest(weight, half, largest / (half[:, None] - 0.5))
    searched = round_to_nearest(weight, half, searched_scales(weight, half, 16, None, torch.float64))
    assert squared_errors(weight, searched.matrix, None).sum() < squared_errors(weight, covering.matrix, None).sum()


def test_codes_keep_to_their_bits_and_zero_groups_are_exact():
    weight, gram = _problem(6, 32)
    weight[2, 8:16] = 0
    found = round_rows(weight, gram, _halves(6, 3), 8, torch.bfloat16)
    assert found.codes_OI.dtype == torch.int8
    assert found.codes_OI.min() >= -4
    assert found.codes_OI.max() <= 3
    assert not Rounded(*found).matrix.isnan().any()
    zeros = round_rows(torch.zeros(2, 16), torch.eye(16), _halves(2, 4), 8, torch.float32)
    assert not zeros.matrix.any()


def test_scales_are_rounded_before_the_codes_are_chosen():
    weight, _ = _problem(4, 16)
    found = round_rows(weight, None, _halves(4, 4), 16, torch.bfloat16)
    assert found.scales_OG.dtype == torch.bfloat16
    again = round_to_nearest(weight, _halves(4, 4), found.scales_OG)
    assert torch.equal(again.codes_OI, found.codes_OI)
