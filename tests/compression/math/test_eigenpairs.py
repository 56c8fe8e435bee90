"""Decompositions in float32 against float64 eigenvalues and the measured loss, on spectra that float32 alone loses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from svdllm.compression.math import eigenpairs as module
from svdllm.compression.math.eigenpairs import eigenpairs
from svdllm.compression.math.linalg import factorise, output_spectrum, tail_energies

SIZE = 320


@pytest.fixture(autouse=True)
def _small_matrices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_SIZE", 1)


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether float32 was enough, for every decomposition of a test."""
    found: list[bool] = []
    in_float32 = module._in_float32

    def noted(*args):
        pairs = in_float32(*args)
        found.append(pairs is not None)
        return pairs

    monkeypatch.setattr(module, "_in_float32", noted)
    return found


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def outliers(in_features: int) -> Tensor:
    """The Gram of inputs with channels a thousand times the others and a common direction: energies over 1e8."""
    x_TI = rand(3 * in_features, in_features, seed=1) + 20 * rand(3 * in_features, 1, seed=2) * rand(
        in_features, seed=3
    )
    x_TI[:, 5::100] *= 1000
    return x_TI.T @ x_TI


def energies(weight_OI: Tensor, gram: Tensor) -> Tensor:
    """Eigenvalues of ``W C W^T`` by singular values of ``W S``, descending."""
    return torch.linalg.svdvals(weight_OI @ torch.linalg.cholesky(gram)).square()


def lost(weight_OI: Tensor, product_OI: Tensor, gram: Tensor, left_OO: Tensor | None = None) -> float:
    error_OI = weight_OI - product_OI
    return float(((error_OI if left_OO is None else left_OO @ error_OI) * (error_OI @ gram)).sum())


@pytest.mark.parametrize("shape", [(SIZE, SIZE), (SIZE, 2 * SIZE), (2 * SIZE, SIZE)], ids=["square", "wide", "tall"])
def test_loses_as_little_as_float64_at_every_rank(shape: tuple[int, int], resolved: list[bool]):
    weight_OI, gram = rand(*shape).float(), outliers(shape[1])
    exact_OI = weight_OI.double()
    best = tail_energies(energies(exact_OI, gram))
    spectrum = output_spectrum(weight_OI, gram, dtype=torch.float32)
    assert resolved == [True]
    assert spectrum.basis_OD.dtype == torch.float32
    tails = tail_energies(spectrum.energies_K)
    for rank in (1, 4, 20, 40, 60, 100, 160, 240):
        u_OR, v_RI = factorise(weight_OI, spectrum, rank)
        measured = lost(exact_OI, u_OR @ v_RI, gram)
        assert measured <= float(best[rank]) * (1 + 1e-6) + 1e-9 * float(best[0])
        assert float(tails[rank]) == pytest.approx(measured, rel=2e-5, abs=1e-9 * float(best[0]))
    u_OR, v_RI = factorise(weight_OI, spectrum, SIZE)
    torch.testing.assert_close(u_OR @ v_RI, exact_OI, rtol=0, atol=2e-5)


def test_float32_alone_would_lose_more():
    """The reason for what is taken out first: the bound above does not hold for ``eigh`` of the rounded matrix."""
    weight_OI, gram = rand(SIZE, SIZE), outliers(SIZE)
    matrix = weight_OI @ gram @ weight_OI.T
    basis = torch.linalg.eigh(matrix.float()).eigenvectors.flip(1)[:, :160].double()
    best = tail_energies(energies(weight_OI, gram))
    assert lost(weight_OI, basis @ (basis.T @ weight_OI), gram) > float(best[160]) * (1 + 1e-3)


@pytest.mark.parametrize("shape", [(SIZE, 2 * SIZE), (2 * SIZE, SIZE)], ids=["wide", "tall"])
def test_in_a_left_metric_too(shape: tuple[int, int], resolved: list[bool]):
    weight_OI, gram, root_OO = rand(*shape).float(), outliers(shape[1]), rand(shape[0], shape[0], seed=7)
    left_OO = root_OO.T @ root_OO / shape[0] + 0.3 * torch.eye(shape[0], dtype=torch.float64)
    exact_OI = weight_OI.double()
    best = tail_energies(energies(torch.linalg.cholesky(left_OO).T @ exact_OI, gram))
    spectrum = output_spectrum(weight_OI, gram, left=left_OO, dtype=torch.float32)
    assert resolved == [True]
    for rank in (1, 20, 100, 200):
        u_OR, v_RI = factorise(weight_OI, spectrum, rank)
        measured = lost(exact_OI, u_OR @ v_RI, gram, left_OO)
        assert measured <= float(best[rank]) * (1 + 1e-6) + 1e-9 * float(best[0])


@pytest.mark.parametrize("metric", ["none", "diagonal"])
def test_metrics_that_are_no_matrix(metric: str, resolved: list[bool]):
    weight_OI = rand(SIZE, 2 * SIZE)
    gram = None if metric == "none" else outliers(2 * SIZE).diagonal()
    root_I = torch.ones(2 * SIZE, dtype=torch.float64) if gram is None else gram.sqrt()
    pairs = eigenpairs(weight_OI, gram, 200, torch.float32)
    assert resolved == [True]
    assert pairs.basis_ND.shape == (SIZE, 200)
    expected = torch.linalg.svdvals(weight_OI * root_I).square()
    torch.testing.assert_close(tail_energies(pairs.energies_N)[:201], tail_energies(expected)[:201], rtol=2e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_size_of_the_data_does_not_matter(scale: float, resolved: list[bool]):
    weight_OI, gram = rand(SIZE, SIZE).float(), outliers(SIZE)
    once, scaled = (eigenpairs(weight_OI, each, 100, torch.float32) for each in (gram, scale * gram))
    assert resolved == [True, True]
    torch.testing.assert_close(
        scaled.energies_N, scale * once.energies_N, rtol=1e-4, atol=scale * 1e-9 * float(once[0][0])
    )


def test_what_float32_does_not_resolve_is_left_to_float64(resolved: list[bool]):
    """Twice as many strong directions as are taken out, and 1e-6 of their energy in the others."""
    left, right = (torch.linalg.qr(rand(SIZE, SIZE, seed=seed)).Q for seed in (1, 2))
    sigma = torch.ones(SIZE, dtype=torch.float64)
    sigma[SIZE // 8 :] = 1e-1
    weight_OI = (left * sigma) @ right
    gram = torch.eye(SIZE, dtype=torch.float64)
    close = eigenpairs(weight_OI, gram, SIZE, torch.float32)
    sigma[SIZE // 8 :] = 2e-2
    weight_OI = (left * sigma) @ right
    far = eigenpairs(weight_OI, gram, SIZE, torch.float32)
    assert resolved == [True, False]
    exact = eigenpairs(weight_OI, gram, SIZE, torch.float64)
    assert torch.equal(far.energies_N, exact.energies_N)
    assert torch.equal(far.basis_ND, exact.basis_ND.float())
    assert float(close.energies_N[-1]) == pytest.approx(1e-2, rel=1e-4)


def test_a_product_that_float32_spoils_is_taken_in_float64(monkeypatch: pytest.MonkeyPatch, resolved: list[bool]):
    """More strong directions in the inputs than channels that are taken out: the random vectors notice."""
    products: list[int] = []
    congruence = module.congruence
    monkeypatch.setattr(module, "congruence", lambda *args: products.append(1) or congruence(*args))
    weight_OI, x_TI, strong_TI = rand(SIZE, SIZE), rand(3 * SIZE, SIZE, seed=1), rand(15, SIZE, seed=9)
    gram = x_TI.T @ x_TI + 1e6 * strong_TI.T @ strong_TI
    eigenpairs(weight_OI, gram, 100, torch.float32)
    assert not products
    monkeypatch.setattr(module, "LEAST_CHANNELS", 10)
    pairs = eigenpairs(weight_OI, gram, 100, torch.float32)
    assert products
    expected = energies(weight_OI, gram)
    torch.testing.assert_close(pairs.energies_N[:100], expected[:100], rtol=1e-5, atol=0)


@pytest.mark.parametrize("num_tokens", [0, 1, 10, 100])
def test_few_tokens(num_tokens: int):
    """A singular Gram: nothing is lost beyond its rank, and full rank gives the weight back."""
    weight_OI = rand(SIZE, SIZE).float()
    x_TI = rand(num_tokens, SIZE, seed=4)
    gram = x_TI.T @ x_TI
    spectrum = output_spectrum(weight_OI, gram, dtype=torch.float32)
    total = float(tail_energies(spectrum.energies_K)[0])
    assert float(tail_energies(spectrum.energies_K)[num_tokens]) <= 1e-6 * total
    for rank in (max(1, num_tokens), SIZE):
        u_OR, v_RI = factorise(weight_OI, spectrum, rank)
        assert lost(weight_OI.double(), u_OR @ v_RI, gram) <= 1e-9 * total
    torch.testing.assert_close(u_OR @ v_RI, weight_OI.double(), rtol=0, atol=2e-5)


def test_no_directions_and_no_finite_number():
    weight_OI, gram = rand(SIZE, SIZE), outliers(SIZE)
    alone = eigenpairs(weight_OI, gram, 0, torch.float32)
    assert alone.basis_ND.shape == (SIZE, 0)
    expected = eigenpairs(weight_OI, gram, SIZE, torch.float64).energies_N
    torch.testing.assert_close(alone.energies_N, expected, rtol=0, atol=1e-14 * float(expected[0]))
    with pytest.raises(torch.linalg.LinAlgError):  # pyright: ignore[reportPrivateImportUsage]
        eigenpairs(torch.full((SIZE, SIZE), math.nan), gram, SIZE, torch.float32)


def test_twice_the_same_bytes():
    weight_OI, gram = rand(2 * SIZE, SIZE).float(), outliers(SIZE)
    first, second = (output_spectrum(weight_OI, gram, 200, dtype=torch.float32) for _ in range(2))
    assert torch.equal(first.basis_OD, second.basis_OD)
    assert torch.equal(first.energies_K, second.energies_K)
