"""Spectra and truncation against the paper's Cholesky form, brute force and numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from reference import measured_loss, optimal_outputs, optimal_product, paper_product, scaled_product
from svdllm.compression.math.linalg import ENERGY_FLOOR, factorise, output_spectrum, tail_energies
from svdllm.compression.math.symmetric import congruence

SHAPES = {"wide": (9, 14), "tall": (14, 9), "square": (11, 11), "row": (1, 6), "column": (6, 1)}
DEFINITE = ("well conditioned", "ill conditioned")
SINGULAR = ("few tokens", "dead channel", "duplicated tokens", "dependent channels")
METRICS = ("none", "diagonal", "gram")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_inputs(kind: str, in_features: int, seed: int = 1) -> Tensor:
    """``X`` (``in x tokens``)."""
    x_IT = rand(in_features, 40, seed=seed)
    if kind == "ill conditioned":
        x_IT = rand(in_features, in_features, seed=seed + 1) @ (
            torch.logspace(0, -4, in_features).double()[:, None] * x_IT
        )
    elif kind == "few tokens":
        x_IT = x_IT[:, : max(1, in_features // 3)]
    elif kind == "dead channel":
        x_IT[in_features // 2] = 0
    elif kind == "duplicated tokens":
        x_IT = x_IT[:, : max(1, in_features // 2)].repeat(1, 5)
    elif kind == "dependent channels":
        x_IT[0] = 2 * x_IT[-1]
    return x_IT


def make_metric(kind: str, x_IT: Tensor) -> tuple[Tensor | None, Tensor]:
    """A metric ``C`` and inputs ``S`` whose Gram it is."""
    if kind == "none":
        return None, torch.eye(len(x_IT), dtype=torch.float64)
    if kind == "diagonal":
        mean_square_I = x_IT.square().mean(1)
        return mean_square_I, mean_square_I.sqrt().diag()
    return x_IT @ x_IT.T, x_IT


def product(weight_OI: Tensor, metric: Tensor | None, rank: int) -> Tensor:
    u_OR, v_RI = factorise(weight_OI, output_spectrum(weight_OI, metric), rank)
    return u_OR @ v_RI


def near(actual: Tensor, expected: Tensor, *, scale: Tensor | float = 1.0, tolerance: float = 1e-10) -> None:
    """Equal to within ``tolerance`` of ``scale``."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=float(scale) * tolerance)


@pytest.fixture(params=[(s, c, m) for s in SHAPES for c in (*DEFINITE, *SINGULAR) for m in METRICS], ids=" ".join)
def case(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weight, metric and inputs of which the metric is the Gram."""
    shape, conditioning, metric = request.param
    weight_OI = rand(*SHAPES[shape])
    return weight_OI, *make_metric(metric, make_inputs(conditioning, weight_OI.shape[1]))


def test_reported_loss_is_the_measured_loss_and_the_optimum_at_every_rank(case):
    weight_OI, metric, inputs_IT = case
    spectrum = output_spectrum(weight_OI, metric)
    tails = tail_energies(spectrum.energies_K)
    total = (weight_OI @ inputs_IT).square().sum()
    near(tails[0], total, scale=total)
    for rank in range(1, min(weight_OI.shape) + 1):
        u_OR, v_RI = factorise(weight_OI, spectrum, rank)
        assert u_OR.shape == (weight_OI.shape[0], rank)
        assert v_RI.shape == (rank, weight_OI.shape[1])
        measured = measured_loss(weight_OI, u_OR @ v_RI, inputs_IT)
        best = (weight_OI @ inputs_IT - optimal_outputs(weight_OI, inputs_IT, rank)).square().sum()
        near(tails[rank], measured, scale=total)
        near(measured, best, scale=total)


def test_loss_falls_with_rank(case):
    weight_OI, metric, _ = case
    spectrum = output_spectrum(weight_OI, metric)
    tails = tail_energies(spectrum.energies_K)
    assert len(tails) == min(weight_OI.shape) + 1
    assert tails[-1] == 0
    assert bool((tails.diff() <= 0).all())
    assert bool((spectrum.energies_K >= 0).all())
    assert bool((spectrum.energies_K.diff() <= 0).all())


def test_full_rank_gives_the_weight_back_also_where_the_data_never_was(case):
    weight_OI, metric, _ = case
    near(product(weight_OI, metric, min(weight_OI.shape)), weight_OI, scale=weight_OI.abs().max())


def test_never_worse_than_plain_svd_in_the_calibration_metric(case):
    weight_OI, metric, inputs_IT = case
    total = (weight_OI @ inputs_IT).square().sum()
    ones = torch.ones(weight_OI.shape[1], dtype=torch.float64)
    for rank in range(1, min(weight_OI.shape) + 1):
        ours = measured_loss(weight_OI, product(weight_OI, metric, rank), inputs_IT)
        plain = measured_loss(weight_OI, scaled_product(weight_OI, ones, rank), inputs_IT)
        assert ours <= plain + 1e-12 * total


def test_the_basis_is_orthonormal_and_a_smaller_depth_is_its_beginning(case):
    weight_OI, metric, _ = case
    basis_OK = output_spectrum(weight_OI, metric).basis_OD
    near(basis_OK.T @ basis_OK, torch.eye(basis_OK.shape[1], dtype=torch.float64), tolerance=1e-13)
    shallow = output_spectrum(weight_OI, metric, depth=1)
    near(shallow.basis_OD, basis_OK[:, :1], tolerance=1e-13)
    assert len(shallow.energies_K) == min(weight_OI.shape)


@pytest.mark.parametrize("conditioning", DEFINITE)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_papers_cholesky_form(shape: str, conditioning: str):
    weight_OI = rand(*SHAPES[shape])
    x_IT = make_inputs(conditioning, weight_OI.shape[1])
    for rank in range(1, min(weight_OI.shape) + 1):
        ours, theirs = product(weight_OI, x_IT @ x_IT.T, rank), paper_product(weight_OI, x_IT, rank)
        near(ours @ x_IT, theirs @ x_IT, scale=(weight_OI @ x_IT).norm())
        if conditioning == "well conditioned":  # else the inverse of S loses digits in channels without energy
            near(ours, theirs, scale=weight_OI.norm())


@pytest.mark.parametrize("conditioning", SINGULAR)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_brute_force_on_the_inputs_where_the_cholesky_form_does_not_exist(shape: str, conditioning: str):
    weight_OI = rand(*SHAPES[shape])
    x_IT = make_inputs(conditioning, weight_OI.shape[1])
    for rank in range(1, min(min(weight_OI.shape), int(torch.linalg.matrix_rank(x_IT))) + 1):
        ours = product(weight_OI, x_IT @ x_IT.T, rank) @ x_IT
        near(ours, optimal_product(weight_OI, x_IT, rank) @ x_IT, scale=(weight_OI @ x_IT).norm())


@pytest.mark.parametrize("shape", ["wide", "tall"])
def test_factors_of_a_smaller_rank_are_the_beginning_of_a_larger_ones_to_the_last_bit(shape: str):
    weight_OI = rand(*{"wide": (70, 150), "tall": (150, 70)}[shape])
    x_IT = make_inputs("well conditioned", weight_OI.shape[1])
    spectrum = output_spectrum(weight_OI, x_IT @ x_IT.T)
    u_full, v_full = factorise(weight_OI, spectrum, 70)
    for rank in range(1, 70):
        u_OR, v_RI = factorise(weight_OI, spectrum, rank)
        assert torch.equal(u_OR, u_full[:, :rank])
        assert torch.equal(v_RI, v_full[:rank])


@pytest.mark.parametrize("shape", ["wide", "tall", "square"])
@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e6])
def test_scaling_the_inputs_scales_the_loss_and_leaves_the_factors(shape: str, factor: float):
    weight_OI = rand(*SHAPES[shape])
    x_IT = make_inputs("well conditioned", weight_OI.shape[1])
    once = output_spectrum(weight_OI, x_IT @ x_IT.T)
    scaled = output_spectrum(weight_OI, factor**2 * (x_IT @ x_IT.T))
    torch.testing.assert_close(
        tail_energies(scaled.energies_K), factor**2 * tail_energies(once.energies_K), rtol=1e-10, atol=0
    )
    (u_OR, v_RI), (scaled_u, scaled_v) = factorise(weight_OI, once, 4), factorise(weight_OI, scaled, 4)
    near(scaled_u @ scaled_v, u_OR @ v_RI)
    near(scaled_u.norm(dim=0), u_OR.norm(dim=0))
    near(scaled_v.norm(dim=1), v_RI.norm(dim=1))


def test_a_basis_of_energies_far_below_the_square_root_of_the_precision_is_orthonormal():
    for out_features, in_features in ((30, 12), (12, 30)):
        left, _ = torch.linalg.qr(rand(out_features, 12))
        right, _ = torch.linalg.qr(rand(in_features, 12, seed=1))
        weight_OI = (left * torch.logspace(0, -14, 12).double()) @ right.T
        basis_OK = output_spectrum(weight_OI, None).basis_OD
        near(basis_OK.T @ basis_OK, torch.eye(12, dtype=torch.float64), tolerance=1e-13)
        near(product(weight_OI, None, 12), weight_OI, tolerance=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
def test_a_zero_weight_has_finite_factors_whose_product_is_zero(shape: str, metric: str):
    weight_OI = torch.zeros(SHAPES[shape], dtype=torch.float64)
    gram, _ = make_metric(metric, make_inputs("well conditioned", weight_OI.shape[1]))
    spectrum = output_spectrum(weight_OI, gram)
    u_OR, v_RI = factorise(weight_OI, spectrum, 1)
    assert bool(torch.isfinite(u_OR).all())
    assert torch.equal(u_OR @ v_RI, weight_OI)
    assert torch.equal(tail_energies(spectrum.energies_K), torch.zeros(min(weight_OI.shape) + 1, dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ndim", [1, 2])
def test_a_zero_gram_loses_nothing_and_full_rank_gives_the_weight_back(shape: str, ndim: int):
    weight_OI = rand(*SHAPES[shape])
    gram = torch.zeros([weight_OI.shape[1]] * ndim, dtype=torch.float64)
    spectrum = output_spectrum(weight_OI, gram)
    assert torch.equal(spectrum.energies_K, torch.zeros(min(weight_OI.shape), dtype=torch.float64))
    near(product(weight_OI, gram, min(weight_OI.shape)), weight_OI)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", METRICS)
def test_inputs_of_any_dtype_are_computed_in_float64(dtype: torch.dtype, metric: str):
    for shape in ("wide", "tall"):
        weight_OI = rand(*SHAPES[shape]).to(dtype)
        gram, _ = make_metric(metric, make_inputs("well conditioned", weight_OI.shape[1]))
        gram = None if gram is None else gram.to(dtype)
        low = output_spectrum(weight_OI, gram)
        high = output_spectrum(weight_OI.double(), None if gram is None else gram.double())
        assert low.energies_K.dtype == low.basis_OD.dtype == torch.float64
        assert torch.equal(low.energies_K, high.energies_K)
        low_factors, high_factors = factorise(weight_OI, low, 3), factorise(weight_OI.double(), high, 3)
        assert all(map(torch.equal, low_factors, high_factors))
        assert low_factors[0].dtype == low_factors[1].dtype == torch.float64


def test_non_finite_input_is_an_error_of_the_iteration():
    with pytest.raises(torch.linalg.LinAlgError):
        output_spectrum(torch.full((3, 3), math.nan), None)


def test_spectrum_by_hand():
    """W = [[1, 2], [0, 1]], C = diag(1, 4): W C W^T = [[17, 8], [8, 4]], trace 21, determinant 4."""
    weight = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    expected = torch.tensor([(21 + math.sqrt(425)) / 2, (21 - math.sqrt(425)) / 2], dtype=torch.float64)
    for gram in (torch.tensor([1.0, 4.0]), torch.diag(torch.tensor([1.0, 4.0]))):
        spectrum = output_spectrum(weight, gram)
        near(spectrum.energies_K, expected, tolerance=1e-13)
        # (17 - λ) a + 8 b = 0 for the leading eigenvector (a, b).
        a, b = spectrum.basis_OD[:, 0].tolist()
        assert (17 - expected[0].item()) * a + 8 * b == pytest.approx(0, abs=1e-12)
    # Without the data the other direction of diag(2, 1) would lead: with C = diag(1, 9) the energies are 9 and 4.
    spectrum = output_spectrum(torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([1.0, 9.0])))
    near(spectrum.energies_K, torch.tensor([9.0, 4.0], dtype=torch.float64))
    near(spectrum.basis_OD.abs(), torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64))


def test_what_goes_into_the_eigenvalues_is_exactly_symmetric():
    x_IT = make_inputs("ill conditioned", 70)
    for gram in (None, x_IT.square().sum(1), x_IT @ x_IT.T):
        product_OO = congruence(rand(50, 70), gram)
        assert torch.equal(product_OO, product_OO.T)


def test_tall_spectrum_by_hand():
    """One column (3, 4) with C = 4: energy 4 * 25, direction (0.6, 0.8)."""
    spectrum = output_spectrum(torch.tensor([[3.0], [4.0]]), torch.tensor([[4.0]]))
    near(spectrum.energies_K, torch.tensor([100.0], dtype=torch.float64))
    near(spectrum.basis_OD.abs(), torch.tensor([[0.6], [0.8]], dtype=torch.float64))


def test_factors_by_hand():
    """W = diag(4, 1): σ/σ_1 = 1, 1/4; the mean square of W over its 2 directions is 17/2."""
    weight = torch.diag(torch.tensor([4.0, 1.0]))
    u_OR, v_RI = factorise(weight, output_spectrum(weight, None), 2)
    size = (17 / 2) ** 0.25
    near(u_OR.abs(), torch.diag(torch.tensor([size, size / 2], dtype=torch.float64)))
    near(v_RI.abs(), torch.diag(torch.tensor([4 / size, 2 / size], dtype=torch.float64)))
    near(u_OR @ v_RI, weight.double())


def test_the_scale_of_a_direction_without_data_is_bounded():
    """Energies 1 and 1e-18: the second is floored at 1e-12, whose fourth root is 1e-3."""
    weight = torch.diag(torch.tensor([1.0, 1e-9], dtype=torch.float64))
    u_OR, v_RI = factorise(weight, output_spectrum(weight, None), 2)
    assert ENERGY_FLOOR == 1e-12
    assert float(u_OR[:, 1].norm() / u_OR[:, 0].norm()) == pytest.approx(1e-3, rel=1e-9)
    near(u_OR @ v_RI, weight, tolerance=1e-15)


def test_tail_energies_by_hand():
    assert tail_energies(torch.tensor([4.0, 2.0, 1.0])).tolist() == [7.0, 3.0, 1.0, 0.0]


def test_tails_keep_small_energies_beside_large_ones():
    """Summed from the small end: 1e-9 would vanish beside 1e9 in a difference of float64 sums."""
    assert tail_energies(torch.tensor([1e9, 1e-9], dtype=torch.float64))[1] == 1e-9
