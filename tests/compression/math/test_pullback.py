"""The pullback of a left metric through a tall weight, against the metric itself and against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from svdllm import Recipe
from svdllm.compression.math.linalg import (
    anchored,
    anchored_with_pullback,
    energy_alone,
    factorise,
    output_spectrum,
)
from svdllm.compression.math.metrics import METRICS
from svdllm.compression.math.pullback import Pullback
from svdllm.compression.math.statistics import GradientGram, GradientPullback
from svdllm.models.structure import Target

OUT, IN = 23, 9


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight_of(kind: str) -> Tensor:
    """A weight (``OUT x IN``) whose singular values are alike, fall to 1e-6, or end with two zeros."""
    smallest = {"well": 0.3, "badly conditioned": 1e-6, "singular": 0.3}[kind]
    sigma = torch.logspace(0, float(np.log10(smallest)), IN, dtype=torch.float64)
    sigma[IN - 2 :] *= kind != "singular"
    left, right = torch.linalg.qr(random(OUT, IN, seed=0)).Q, torch.linalg.qr(random(IN, IN, seed=1)).Q
    return (left * sigma) @ right


def metrics_of(weight_OI: Tensor, gradients_TO: Tensor) -> tuple[Tensor, Pullback]:
    """``0.7 H + D``, and its pullback."""
    product_OO = 0.7 * gradients_TO.mT @ gradients_TO
    diagonal_O = 0.1 + random(len(weight_OI), seed=2).square()
    return product_OO + diagonal_O.diag(), Pullback(weight_OI.mT @ product_OO @ weight_OI, diagonal_O)


def right_metric(kind: str) -> Tensor | None:
    if kind == "none":
        return None
    gram_II = random(IN, 40, seed=3) @ random(IN, 40, seed=3).mT
    return gram_II if kind == "gram" else gram_II.diagonal()


@pytest.mark.parametrize("right", ["none", "diagonal", "gram"])
@pytest.mark.parametrize("kind", ["well", "badly conditioned", "singular"])
@pytest.mark.parametrize("windows", [4, 40])
def test_the_spectrum_and_the_truncations_are_those_of_the_whole_metric(kind: str, right: str, windows: int):
    weight_OI, gram = weight_of(kind), right_metric(right)
    left_OO, pullback = metrics_of(weight_OI, random(windows, OUT, seed=4))
    root_II = torch.eye(IN, dtype=torch.float64) if gram is None else gram.sqrt().diag() if gram.ndim == 1 else None
    root_II = np.linalg.cholesky(gram) if root_II is None else root_II.numpy()  # pyright: ignore[reportArgumentType]
    weighed_OI = np.linalg.cholesky(left_OO).T @ weight_OI.numpy() @ root_II
    u_OI, sigma_I, v_II = np.linalg.svd(weighed_OI, full_matrices=False)
    spectrum = output_spectrum(weight_OI, gram, left=pullback)
    scale = float(sigma_I[0]) ** 2
    assert_close(spectrum.energies_K / scale, torch.from_numpy(sigma_I**2) / scale, rtol=1e-9, atol=1e-12)
    assert_close(energy_alone(weight_OI, gram, pullback).energies_K, torch.tensor([(sigma_I**2).sum()]))
    for rank in (1, 3, 6):
        u_OR, v_RI = factorise(weight_OI, spectrum, rank)
        weighed = np.linalg.cholesky(left_OO).T @ (u_OR @ v_RI).numpy() @ root_II
        best = (u_OI[:, :rank] * sigma_I[:rank]) @ v_II[:rank]
        tolerance = 1e-9 if kind == "well" else 1e-6  # neighbours in a flat spectrum
        np.testing.assert_allclose(weighed, best, rtol=0, atol=tolerance * sigma_I[0])
        whole = factorise(weight_OI, output_spectrum(weight_OI, gram, left=left_OO), rank)
        if kind == "well":
            assert_close(u_OR @ v_RI, whole[0] @ whole[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["well", "badly conditioned", "singular"])
def test_at_full_rank_the_weight_comes_back(kind: str):
    weight_OI = weight_of(kind)
    _, pullback = metrics_of(weight_OI, random(3, OUT, seed=4))
    gram_II = random(IN, 4, seed=5) @ random(IN, 4, seed=5).mT  # singular
    u_OR, v_RI = factorise(weight_OI, output_spectrum(weight_OI, gram_II, left=pullback), IN)
    assert_close(u_OR @ v_RI, weight_OI, rtol=0, atol=1e-9)


def test_leading_directions_in_float32_are_those_of_float64():
    """Of a product with the rounding errors of float32, which a singular weight makes indefinite."""
    weight_OI, gram = weight_of("singular"), right_metric("gram")
    _, pullback = metrics_of(weight_OI, random(40, OUT, seed=4))
    rounded = pullback._replace(product_II=pullback.product_II.float())
    exact, found = (
        factorise(weight_OI, output_spectrum(weight_OI, gram, 4, left=left), 4) for left in (pullback, rounded)
    )
    assert_close(found[0] @ found[1], exact[0] @ exact[1], rtol=0, atol=1e-5)


def target_of(*sizes: int) -> Target:
    names = ("a.k_proj", "a.v_proj")[: len(sizes)]
    return Target(
        name=names[0],
        block=0,
        in_features=IN,
        out_features=sum(sizes),
        has_bias=False,
        is_conv1d=False,
        group=names[0],
        parts=tuple(zip(names, sizes, strict=True)) if len(sizes) > 1 else (),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_added_up_after_the_weights(dtype: torch.dtype):
    weights = [random(size, IN, seed=size).to(dtype) for size in (14, 9)]
    gradients = random(2, 5, OUT, seed=6).to(dtype)
    statistic = GradientPullback(weights)
    statistic.add(gradients[:, :0], gradients[:1])
    statistic.add(gradients[:, :0], gradients[1:])
    found, start = statistic.value(), 0
    for number, weight in enumerate(weights):
        own = gradients.double().flatten(0, 1).numpy()[:, start : start + len(weight)]
        through = own @ weight.double().numpy()
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        np.testing.assert_allclose(found.products[number], through.T @ through, rtol=tolerance, atol=tolerance * 100)
        np.testing.assert_allclose(found.traces_P[number], (own**2).sum(), rtol=tolerance)
        start += len(weight)


@pytest.mark.parametrize("sizes", [(OUT,), (14, 9)])
@pytest.mark.parametrize("input_only", [(), (r"\.k_proj$",)])
@pytest.mark.parametrize("silent", [False, True], ids=["gradients", "no gradients of the first"])
def test_the_two_sided_metric_is_the_same_in_both_forms(sizes: tuple[int, ...], input_only: Any, silent: bool):
    """Pulled back, the metric that is made of ``G`` is that which is made of ``W^T G W`` of each linear."""
    target, weight_OI, gradients = target_of(*sizes), weight_of("well"), random(2, 5, OUT, seed=7)
    gradients[..., : sizes[0]] *= not silent
    settings = Recipe(ratio=0.3, metric="two-sided", input_only=input_only, gradient_shrinkage=0.2)
    whole, pulled = GradientGram(OUT), GradientPullback(list(weight_OI.split(list(sizes))))
    for statistic in (whole, pulled):
        statistic.add(gradients[..., :0], gradients)
    left = METRICS["two-sided"].left
    assert left is not None
    left_OO, pullback = (left.metric(target, statistic.value(), settings) for statistic in (whole, pulled))
    assert isinstance(left_OO, Tensor)
    assert isinstance(pullback, Pullback)
    assert_close(pullback.gram(weight_OI), weight_OI.mT @ left_OO @ weight_OI, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("beta", [0.0, 0.6, 1.0])
def test_the_metric_follows_a_weight_that_is_anchored(beta: float):
    weight_OI, dense_IT, noise_IT = weight_of("well"), random(IN, 40, seed=8), random(IN, 40, seed=9)
    left_OO, pullback = metrics_of(weight_OI, random(12, OUT, seed=4))
    compressed_IT = dense_IT + 0.3 * noise_IT
    gram_II, missing_II = compressed_IT @ compressed_IT.mT, beta * (dense_IT - compressed_IT) @ compressed_IT.mT
    star_OI, followed = anchored_with_pullback(weight_OI, gram_II, missing_II if beta else None, pullback)
    assert_close(star_OI, anchored(weight_OI, gram_II, weight_OI @ missing_II), rtol=1e-9, atol=1e-9)
    assert_close(followed.gram(star_OI), star_OI.mT @ left_OO @ star_OI, rtol=1e-9, atol=1e-9)
