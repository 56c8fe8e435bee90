"""The table of methods: every row against its own formula, and the order in which the methods should come."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reference import measured_loss, scaled_product
from runs import target
from svdllm import Recipe
from svdllm.compression.math.linalg import factorise, output_spectrum
from svdllm.compression.math.metrics import METHODS
from svdllm.compression.math.statistics import Gram, MeanAbsolute, RowFisher


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def compress(name: str, weight_OI: Tensor, inputs_IT: Tensor, rank: int, alpha: float = 0.5) -> Tensor:
    """``W'`` of a method, by the way that a run takes: statistic, metric, spectrum, factors."""
    method, settings = METHODS[name], Recipe(method=name, metric="input", shrinkage=0.0, asvd_alpha=alpha)
    value = None
    if method.statistic is not None:
        statistic = method.statistic(weight_OI.shape[1])
        statistic.add(inputs_IT.T)
        value = statistic.value()
    u_OR, v_RI = factorise(weight_OI, output_spectrum(weight_OI, method.right(value, settings)), rank)
    return u_OR @ v_RI


def test_the_rows_of_the_table():
    assert {name: method.statistic for name, method in METHODS.items()} == {
        "svd-llm": Gram,
        "svd": None,
        "asvd": MeanAbsolute,
        "fwsvd": None,
    }
    for name, method in METHODS.items():
        assert method.name == name
        assert method.summary
        assert method.source


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_svd_is_eckart_youngs(shape: tuple[int, int]):
    weight_OI, ones = rand(*shape), torch.ones(shape[1], dtype=torch.float64)
    for rank in (1, 4, 8):
        ours = compress("svd", weight_OI, rand(shape[1], 30), rank)
        torch.testing.assert_close(ours, scaled_product(weight_OI, ones, rank), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_asvd_is_its_formula(shape: tuple[int, int], alpha: float):
    weight_OI, inputs_IT = rand(*shape), rand(shape[1], 30, seed=1) * torch.logspace(-1, 1, shape[1]).double()[:, None]
    scale_I = inputs_IT.abs().mean(1) ** alpha
    for rank in (1, 4, 8):
        ours = compress("asvd", weight_OI, inputs_IT, rank, alpha)
        torch.testing.assert_close(ours, scaled_product(weight_OI, scale_I, rank), rtol=0, atol=1e-10)


def test_asvd_metric_by_hand():
    """Means 4, 9 and 0.25 with alpha 0.5: S is 2, 3 and 0.5, and C = S^2; with alpha 1 C is the squares."""
    mean = torch.tensor([4.0, 9.0, 0.25], dtype=torch.float64)
    assert METHODS["asvd"].right(mean, Recipe(method="asvd", asvd_alpha=0.5)).tolist() == [4.0, 9.0, 0.25]
    assert METHODS["asvd"].right(mean, Recipe(method="asvd", asvd_alpha=1.0)).tolist() == [16.0, 81.0, 0.0625]
    assert METHODS["asvd"].right(mean, Recipe(method="asvd", asvd_alpha=0.0)).tolist() == [1.0, 1.0, 1.0]


def test_asvd_gives_dead_channels_the_smallest_living_scale():
    metric = METHODS["asvd"].right(
        torch.tensor([4.0, 0.0, 0.25], dtype=torch.float64), Recipe(method="asvd", asvd_alpha=0.5)
    )
    assert metric.tolist() == [4.0, 0.25, 0.25]
    assert METHODS["asvd"].right(
        torch.zeros(2, dtype=torch.float64), Recipe(method="asvd", asvd_alpha=0.5)
    ).tolist() == [1.0, 1.0]
    inputs_IT = rand(12, 30)
    inputs_IT[3] = 0
    assert bool(torch.isfinite(compress("asvd", rand(8, 12), inputs_IT, 4)).all())


def test_svd_llm_is_the_gram_itself_and_svd_the_identity():
    gram = rand(3, 3)
    assert METHODS["svd-llm"].right(gram, Recipe(shrinkage=0.0)) is gram
    assert METHODS["svd"].right(None, Recipe()) is None
    assert METHODS["svd"].right(gram, Recipe()) is None


def test_outlier_channels_tell_the_methods_apart():
    """Three channels are a hundred times larger, and channels correlate: a method that knows more loses less."""
    weight_OI = rand(24, 32)
    inputs_IT = rand(32, 32, seed=1) @ rand(32, 400, seed=2)
    inputs_IT[[3, 11, 20]] *= 100
    losses = {name: measured_loss(weight_OI, compress(name, weight_OI, inputs_IT, 8), inputs_IT) for name in METHODS}
    assert 1.3 * losses["svd-llm"] < losses["asvd"]
    assert 10 * losses["asvd"] < losses["svd"]


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_fwsvd_weighs_rows_by_their_fisher_information(shape: tuple[int, int]):
    """Against the truncated SVD of ``D W``, ``D`` the root of each row's summed squared gradients, window by window."""
    weight_OI, inputs_WTI = rand(*shape), rand(3, 5, shape[1], seed=1)
    gradients_WTO = rand(3, 5, shape[0], seed=2) * torch.logspace(-1, 1, shape[0]).double()
    fisher = RowFisher(shape[0])
    fisher.add(inputs_WTI[:2], gradients_WTO[:2])
    fisher.add(inputs_WTI[2:], gradients_WTO[2:])
    per_window = [
        torch.outer(g, x) for xs, gs in zip(inputs_WTI, gradients_WTO, strict=True) for x, g in zip(xs, gs, strict=True)
    ]
    squares_OI = sum(sum(per_window[5 * w : 5 * w + 5]).pow(2) for w in range(3))
    torch.testing.assert_close(fisher.value(), squares_OI.sum(1), rtol=1e-5, atol=0)
    scale_O = squares_OI.sum(1).sqrt()
    metric_OO = fwsvd_metric(fisher.value())
    for rank in (1, 4, 8):
        u_OS, s_S, v_SI = torch.linalg.svd(scale_O[:, None] * weight_OI, full_matrices=False)
        expected = (u_OS[:, :rank] * s_S[:rank]) @ v_SI[:rank] / scale_O[:, None]
        u_OR, v_RI = factorise(weight_OI, output_spectrum(weight_OI, None, left=metric_OO), rank)
        torch.testing.assert_close(u_OR @ v_RI, expected, rtol=0, atol=1e-4)


def test_fwsvd_keeps_rows_without_gradient_defined():
    metric_OO = fwsvd_metric(torch.tensor([4.0, 0.0, 2.0], dtype=torch.float64))
    assert metric_OO.tolist() == [[1.5, 0.0, 0.0], [0.0, 0.75, 0.0], [0.0, 0.0, 0.75]]
    assert fwsvd_metric(torch.zeros(2, dtype=torch.float64)).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def fwsvd_metric(fisher_O: Tensor) -> Tensor:
    left = METHODS["fwsvd"].left
    assert left is not None
    return left.of(target(len(fisher_O), 1), fisher_O, Recipe(method="fwsvd"))
