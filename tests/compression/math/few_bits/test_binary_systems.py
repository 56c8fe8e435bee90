"""PB-LLM and BiLLM, against direct implementations row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gram_problems import damped, problem
from svdllm.compression.math.few_bits.billm import billm, billm_bits, large_of, salient_of
from svdllm.compression.math.few_bits.binary import binarised, binarised_twice
from svdllm.compression.math.few_bits.pb_llm import pb_llm, pb_llm_bits


def upper_factor(gram: np.ndarray) -> np.ndarray:
    """U with ``U^T U`` the inverse of a damped Gram, from the lower factor of the reversed Gram."""
    reversed_lower = np.linalg.cholesky(gram[::-1, ::-1])
    return np.linalg.inv(reversed_lower)[::-1, ::-1]


def binary_row(values: list[float]) -> list[float]:
    """Mean and mean distance of some numbers, by hand."""
    mean = sum(values) / len(values)
    distance = sum(abs(value - mean) for value in values) / len(values)
    return [mean + (distance if value >= mean else -distance) for value in values]


def test_a_row_is_binarised_by_hand():
    values = torch.tensor([[1.0, 3.0, 8.0, 100.0], [0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, False], [False] * 4])
    found = binarised(values, mask)
    # mean 4, distances 3, 1 and 4: 8/3
    torch.testing.assert_close(found[0], torch.tensor([4 - 8 / 3, 4 - 8 / 3, 4 + 8 / 3, 0.0]))
    assert (found[1] == 0).all()
    left = [1 - 4 / 3, 3 - 4 / 3, 8 - 20 / 3]  # 4 + 8/3 is 20/3
    twice = [first + second for first, second in zip([4 / 3, 4 / 3, 20 / 3], binary_row(left), strict=True)]
    torch.testing.assert_close(binarised_twice(values, mask)[0, :3], torch.tensor(twice))


def test_pb_llm_is_the_loop_over_columns_with_two_grids():
    weight, gram = problem(6, 20)
    factor = upper_factor(damped(gram).numpy())
    left = weight.numpy().copy()
    salience = left**2 / np.diag(factor) ** 2
    salient = np.zeros_like(left, dtype=bool)
    for place in sorted(range(left.size), key=lambda place: -salience.flat[place])[:12]:  # a tenth of 120
        salient.flat[place] = True
    others = np.where(salient, 0.0, left)
    mean = others.sum(1) / 20
    distance = np.abs(others - mean[:, None]).sum(1) / 20
    least, step = left.min(1), (left.max(1) - left.min(1)) / 255
    expected = np.zeros_like(left)
    for column in range(20):
        for row in range(6):
            value = left[row, column]
            code = min(max(round((value - least[row]) / step[row]), 0), 255)
            binary = mean[row] + (distance[row] if value >= mean[row] else -distance[row])
            expected[row, column] = least[row] + code * step[row] if salient[row, column] else binary
        error = (left[:, column] - expected[:, column]) / factor[column, column]
        left[:, column:] -= np.outer(error, factor[column, column:])
    found = pb_llm(weight, gram)
    torch.testing.assert_close(found.weight_OI, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)
    assert found.bits == pb_llm_bits(6, 20) == 12 * 8 + 108
    assert found.stored_bits == found.bits + 120 + 6 * 4 * 16  # a mask, and four numbers a row


def test_salient_columns_and_threshold_have_the_least_error_of_all_that_are_tried():
    salience = problem(4, 12, seed=3)[0].square()
    ranked = sorted(range(12), key=lambda column: -float(salience[:, column].sum()))
    errors = {}
    for count in range(1, 12):
        mask = torch.zeros(4, 12, dtype=torch.bool)
        mask[:, ranked[:count]] = True
        found = binarised_twice(salience, mask) + binarised_twice(salience, ~mask)
        errors[count] = float((salience - found).square().sum())
    best = min(errors, key=lambda count: errors[count])
    salient = salient_of(salience)
    assert set(salient.nonzero()[:, 0].tolist()) == set(ranked[:best])
    large = large_of(salience, salient)
    others = ~salient.expand(4, 12)
    assert not (large & ~others).any()

    def error_of(threshold: float) -> float:
        above = others & (salience > threshold)
        found = binarised(salience, above) + binarised(salience, others & ~above)
        return float((salience - found)[others].square().sum())

    values = salience[others].sort().values
    tried = [float(values[round(float(place) * (len(values) - 1))]) for place in np.linspace(0.1, 0.9, 81)]
    found = binarised(salience, large) + binarised(salience, others & ~large)
    assert float((salience - found)[others].square().sum()) == pytest.approx(min(map(error_of, tried)))


@pytest.mark.parametrize(("rows", "columns"), [(6, 20), (5, 200)])
def test_billm_binarises_blocks_and_hands_on_the_errors_of_single_columns(rows: int, columns: int):
    weight, gram = problem(rows, columns, seed=1)
    factor = torch.from_numpy(upper_factor(damped(gram).numpy()).copy())
    left, expected, num_salient = weight.clone(), torch.empty_like(weight), 0
    for start in range(0, columns, 128):
        block = slice(start, min(start + 128, columns))
        values = left[:, block]
        salience = (values / factor.diagonal()[block]) ** 2
        salient = salient_of(salience)
        large = large_of(salience, salient)
        num_salient += int(salient.sum())
        for row in range(rows):
            numbers = values[row].tolist()
            others = [i for i in range(len(numbers)) if not salient[i]]
            groups = [[i for i in range(len(numbers)) if salient[i]]]
            groups += [[i for i in others if bool(large[row, i]) == is_large] for is_large in (True, False)]
            for group, times in zip(groups, (2, 1, 1), strict=True):
                total = [0.0] * len(group)
                for _ in range(times if group else 0):
                    rest = [numbers[i] - done for i, done in zip(group, total, strict=True)]
                    total = [done + more for done, more in zip(total, binary_row(rest), strict=True)]
                expected[row, [start + i for i in group]] = torch.tensor(total, dtype=torch.float64)
        error = (values - expected[:, block]) / factor.diagonal()[block]
        left[:, block.stop :] -= error @ factor[block, block.stop :]
    found = billm(weight, gram)
    torch.testing.assert_close(found.weight_OI, expected, rtol=1e-8, atol=1e-8)
    share = num_salient / columns
    assert found.bits == billm_bits(rows, columns, num_salient)
    assert found.bits / weight.numel() == pytest.approx(2 * share + (1 - share))
    blocks = -(-columns // 128)
    assert found.stored_bits == found.bits + rows * columns + columns + rows * blocks * 8 * 16
