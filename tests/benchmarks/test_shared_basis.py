"""A shared basis against the theory of one matrix, a dense solve of its normal equations, and full rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shared_basis import _Problem, products_with_shared_basis, shared_basis, shared_rank
from svdllm.compression.math.linalg import output_spectrum, tail_energies

E, OUT, IN = 3, 6, 5


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def metric(size: int, seed: int) -> Tensor:
    root = rand(size, 3 * size, seed=seed) * torch.logspace(0, 1, size, dtype=torch.float64)[:, None]
    return root @ root.mT


def problem(count: int = E) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    weights = [rand(OUT, IN, seed=n) for n in range(count)]
    return weights, [metric(IN, 10 + n) for n in range(count)], [metric(OUT, 20 + n) for n in range(count)]


def total_error(weights: list[Tensor], products: list[Tensor], grams: list[Tensor], lefts: list[Tensor]) -> float:
    terms = zip(weights, products, grams, lefts, strict=True)
    return sum(torch.trace(g @ (w - p) @ c @ (w - p).mT).item() for w, p, c, g in terms)


def test_one_matrix_alone_has_the_error_of_its_truncation() -> None:
    weights, grams, lefts = problem(1)
    expected = tail_energies(output_spectrum(weights[0], grams[0], left=lefts[0]).energies_K)
    for rank in range(1, IN):
        assert shared_basis(weights, grams, lefts, rank).errors[-1] == pytest.approx(float(expected[rank]), rel=1e-8)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_error_never_rises_and_is_what_it_says(rank: int) -> None:
    made = shared_basis(*problem(), rank)
    assert len(made.errors) > 2
    assert all(after <= before * (1 + 1e-12) for before, after in zip(made.errors, made.errors[1:], strict=False))
    weights, grams, lefts = problem()
    products = [u @ made.v_RI for u in made.us_OR]
    assert total_error(weights, products, grams, lefts) == pytest.approx(made.errors[-1], rel=1e-10)


def test_full_rank_is_exact() -> None:
    weights, grams, lefts = problem()
    made = shared_basis(weights, grams, lefts, IN)
    for weight, u in zip(weights, made.us_OR, strict=True):
        torch.testing.assert_close(u @ made.v_RI, weight, atol=1e-10, rtol=1e-10)


def test_the_step_for_the_basis_solves_its_normal_equations() -> None:
    weights, grams, lefts = problem()
    made = shared_basis(weights, grams, lefts, 2)
    terms = list(zip(made.us_OR, lefts, weights, grams, strict=True))
    matrix = sum((torch.kron(u.mT @ g @ u, c) for u, g, _, c in terms), torch.zeros(()))
    right = sum((u.mT @ g @ w @ c for u, g, w, c in terms), torch.zeros(()))
    expected = torch.linalg.solve(matrix, right.reshape(-1)).reshape(2, IN)
    found = _Problem(weights, grams, lefts).improved(made.us_OR, torch.zeros_like(made.v_RI))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_coefficients_solve_theirs() -> None:
    weights, grams, lefts = problem()
    v = rand(2, IN, seed=40)
    for weight, gram, u in zip(weights, grams, _Problem(weights, grams, lefts).coefficients(v), strict=True):
        root = torch.linalg.cholesky(gram)
        expected = torch.linalg.lstsq((v @ root).mT, (weight @ root).mT).solution.mT
        torch.testing.assert_close(u, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("side", "full"), [("in", IN), ("out", OUT)])
def test_products_fit_their_budget_on_either_side(side: str, full: int) -> None:
    weights, grams, lefts = problem()
    one, others = (IN, OUT) if side == "in" else (OUT, IN)
    assert shared_rank(weights, 2 * (one + E * others) + 1, side) == 2
    made = products_with_shared_basis(weights, grams, lefts, 2 * (one + E * others), side)
    assert made is not None
    stacked = torch.cat(made) if side == "in" else torch.cat(made, dim=1)
    assert torch.linalg.matrix_rank(stacked) == 2
    assert products_with_shared_basis(weights, grams, lefts, (full + 1) * (one + E * others), side) is None
