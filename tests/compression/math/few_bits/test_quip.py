"""QuIP#: the codebook, the rotations, and what they gain."""

from __future__ import annotations

import itertools

import pytest
import torch

from gram_problems import loss, problem
from svdllm.compression.math.few_bits.e8p import magnitudes, nearest_points
from svdllm.compression.math.few_bits.gptq import gptq
from svdllm.compression.math.few_bits.incoherence import hadamard, random_rotation, walsh
from svdllm.compression.math.few_bits.quip import quip, quip_bits


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def codebook() -> torch.Tensor:
    """All points that the bits of a code can name: a row, signs with an even number of turns, a shift."""
    even = [signs for signs in itertools.product((1.0, -1.0), repeat=8) if signs.count(-1.0) % 2 == 0]
    odd = [signs for signs in itertools.product((1.0, -1.0), repeat=8) if signs.count(-1.0) % 2 == 1]
    points = []
    for row in magnitudes().tolist():
        signs = torch.tensor(even if sum(row) % 2 == 0 else odd)
        points.append(signs * torch.tensor(row))
    unshifted = torch.cat(points)
    return torch.cat([unshifted + 0.25, unshifted - 0.25])


def test_the_codebook_has_two_to_the_sixteen_points_of_d8_shifted():
    points = codebook()
    assert len({tuple(point) for point in points.tolist()}) == 2**16
    unshifted = torch.where(((points - 0.25) * 2 % 2 == 1).all(1, keepdim=True), points - 0.25, points + 0.25)
    halves = unshifted - 0.5
    assert (halves == halves.round()).all()  # half-integers
    assert (unshifted.sum(1) % 2 == 0).all()  # of an even sum: D8 + 1/2
    squared = magnitudes().square().sum(1)
    assert squared.max() == 12
    assert int((squared <= 10).sum()) == 227


def test_all_rows_of_a_norm_up_to_ten_are_there():
    every = itertools.product((0.5, 1.5, 2.5), repeat=8)
    expected = {row for row in every if sum(value**2 for value in row) <= 10}
    assert expected < {tuple(row) for row in magnitudes().tolist()}


def test_the_nearest_point_is_that_of_a_search_of_the_whole_codebook():
    vectors = 1.4 * torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    vectors[0], vectors[1, 3] = 0.0, 0.0
    points = codebook()
    distances = torch.cdist(vectors.double(), points.double())
    found = (vectors - nearest_points(vectors)).double().norm(dim=1)
    torch.testing.assert_close(found, distances.min(1).values, rtol=1e-6, atol=1e-6)
    known = {tuple(point) for point in points.tolist()}
    assert all(tuple(point) in known for point in nearest_points(vectors).tolist())


def test_normal_values_lose_less_than_by_the_best_four_levels_each():
    values = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    error = (values - nearest_points(1.03 * values) / 1.03).square().mean()
    assert error < 0.1 < 0.1175  # the four levels of Lloyd and Max


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 24, 28, 36, 44, 60])
def test_hadamard_matrices(size: int):
    matrix = hadamard(size)
    assert matrix is not None
    assert (matrix.abs() == 1).all()
    assert torch.equal(matrix @ matrix.mT, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 6, 9, 16, 92])
def test_sizes_without_a_matrix_of_paley(size: int):
    assert hadamard(size) is None


@pytest.mark.parametrize("size", [1, 64, 36, 96, 72, 30, 7, 15])  # 30, 7 and 15 have no Hadamard core
def test_rotations_are_orthogonal_and_undone(size: int):
    rotation = random_rotation(size, torch.Generator().manual_seed(1))
    eye = torch.eye(size, dtype=torch.float64)
    matrix = rotation.apply(eye).mT
    torch.testing.assert_close(matrix @ matrix.mT, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation.undo(eye), matrix, rtol=0, atol=1e-12)
    assert size in (7, 15) or float(matrix.abs().max()) < 1 or size == 1


def test_a_rotation_of_a_power_of_two_is_flat():
    rotation = random_rotation(64, torch.Generator().manual_seed(1))
    matrix = rotation.apply(torch.eye(64, dtype=torch.float64))
    torch.testing.assert_close(matrix.abs(), torch.full((64, 64), 1 / 8, dtype=torch.float64))
    torch.testing.assert_close(walsh(torch.tensor([1.0, 0.0, 0.0, 0.0])), torch.full((4,), 0.5))


@pytest.mark.parametrize(("rows", "columns"), [(24, 40), (10, 30)])
def test_nothing_is_lost_without_rounding(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("svdllm.compression.math.few_bits.quip.nearest_points", lambda vectors: vectors)
    weight, gram = problem(rows, columns)
    found = quip(weight, gram, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.weight_OI, weight, rtol=0, atol=1e-10)
    codes = rows * -(-columns // 8)
    assert found.bits == quip_bits(rows, columns) == 16 * codes
    assert found.stored_bits == found.bits + rows + columns + 16


def test_rounding_is_in_the_rotated_space_and_better_than_two_bits_of_gptq():
    weight, gram = problem(64, 96, dtype=torch.float32)
    weight[3, 5] = 30.0  # an outlier, which the rotation spreads
    found = quip(weight, gram, seeded()).weight_OI
    scalar = gptq(weight, gram, 2).weight_OI
    assert loss(weight, found, gram) < 0.9 * loss(weight, scalar, gram)
    nowhere = torch.eye(96, dtype=torch.float64) * gram.diagonal().mean().double()  # a metric without feedback
    assert loss(weight, found, gram) < 0.8 * loss(weight, quip(weight, nowhere, seeded()).weight_OI, gram)
    generator = seeded()
    outputs, inputs = random_rotation(64, generator), random_rotation(96, generator)
    rotated = outputs.apply(inputs.apply(found.double()).mT).mT
    scale = outputs.apply(inputs.apply(weight.double()).mT).square().mean().sqrt() / 1.03
    vectors = (rotated / scale).float().reshape(-1, 8)
    torch.testing.assert_close(vectors, nearest_points(vectors), rtol=0, atol=1e-3)
