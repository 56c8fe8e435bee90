"""Narrower MLPs against least squares on explicit data and against brute force over all subsets."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from svdllm.compression.math import narrowing
from svdllm.compression.math.narrowing import inner_order, kept_rows, narrowed_anchored, narrowing_tails, refitted

OUT, INNER, TOKENS = 5, 9, 60


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(inner: int = INNER, tokens: int = TOKENS, seed: int = 1) -> Tensor:
    """Inner features of very different scales, each a mixture of others."""
    mixing = torch.eye(inner, dtype=torch.float64) + 0.7 * random(inner, inner, seed=seed)
    return torch.logspace(0, -1, inner, dtype=torch.float64)[:, None] * (mixing @ random(inner, tokens, seed=seed + 1))


def left_metric(seed: int = 3) -> tuple[Tensor, Tensor]:
    """``G`` and a root ``L`` with ``L^T L = G``."""
    root = random(OUT, OUT, seed=seed) + 2 * torch.eye(OUT, dtype=torch.float64)
    return root.mT @ root, root


def fitted(outputs: Tensor, inputs: Tensor) -> Tensor:
    """The weight for which ``weight @ inputs`` is nearest to ``outputs``."""
    solution, *_ = np.linalg.lstsq(inputs.mT.numpy(), outputs.mT.numpy(), rcond=None)
    return torch.from_numpy(solution).mT


def least_loss(weight: Tensor, inputs: Tensor, kept: list[int], root: Tensor | None = None) -> float:
    error = weight @ inputs - fitted(weight @ inputs, inputs[kept]) @ inputs[kept]
    return float((error if root is None else root @ error).square().sum())


@pytest.mark.parametrize("two_sided", [False, True])
def test_tails_are_the_losses_of_least_squares(two_sided: bool):
    weight, inputs = random(OUT, INNER, seed=0), correlated()
    left, root = left_metric() if two_sided else (None, None)
    order = torch.randperm(INNER, generator=torch.Generator().manual_seed(4))
    tails = narrowing_tails(weight, inputs @ inputs.mT, order, left)
    expected = [least_loss(weight, inputs, order[:width].tolist(), root) for width in range(INNER)]
    assert_close(tails, torch.tensor([*expected, 0.0], dtype=torch.float64), rtol=1e-3, atol=1e-9)
    assert tails.shape == (INNER + 1,)


def test_tails_of_independent_features_by_hand():
    """``C = diag(4, 1)``, ``W = (1 3)``: losing the first costs 4, losing the second 9."""
    weight, gram = torch.tensor([[1.0, 3.0]]), torch.diag(torch.tensor([4.0, 1.0]))
    order = inner_order(weight, gram)
    assert order.tolist() == [1, 0]
    expected = torch.tensor([13.0, 4.0, 0.0], dtype=torch.float64)
    assert_close(narrowing_tails(weight, gram, order), expected, rtol=1e-5, atol=0)


def test_a_refit_is_that_of_least_squares():
    weight, inputs = random(OUT, INNER, seed=0), correlated()
    kept = torch.tensor([7, 0, 3, 2])
    expected = fitted(weight @ inputs, inputs[kept])
    assert_close(refitted(weight, inputs @ inputs.mT, kept), expected, rtol=1e-3, atol=1e-4)


def test_at_full_width_a_refit_is_the_weight():
    weight, inputs = random(OUT, INNER, seed=0), correlated()
    order = torch.arange(INNER).flip(0)
    assert_close(refitted(weight, inputs @ inputs.mT, order), weight.flip(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_an_anchored_refit_is_that_of_least_squares_on_the_compressed_stream(beta: float):
    weight, dense = random(OUT, INNER, seed=0), correlated()
    compressed = dense + 0.3 * correlated(seed=8)
    kept = torch.tensor([5, 1, 8])
    outputs = weight @ (beta * dense + (1 - beta) * compressed)
    missing = beta * weight @ (dense - compressed) @ compressed.mT
    gram = compressed @ compressed.mT
    fit = narrowed_anchored(weight, gram, kept, missing)
    assert_close(fit, fitted(outputs, compressed[kept]), rtol=1e-3, atol=1e-4)
    assert torch.equal(gram, compressed @ compressed.mT)
    assert_close(narrowed_anchored(weight, gram, kept, missing, overwrite=True), fit, rtol=1e-12, atol=1e-12)
    assert not torch.equal(gram, compressed @ compressed.mT)


@pytest.mark.parametrize("two_sided", [False, True])
def test_the_order_is_that_of_greedy_elimination(two_sided: bool):
    weight, inputs = random(OUT, INNER, seed=0), correlated()
    left, root = left_metric() if two_sided else (None, None)
    kept, removed = list(range(INNER)), []
    while kept:
        losses = [least_loss(weight, inputs, [j for j in kept if j != i], root) for i in kept]
        removed.append(kept.pop(int(np.argmin(losses))))
    assert inner_order(weight, inputs @ inputs.mT, left).tolist() == removed[::-1]


def test_removing_several_features_together_costs_little(monkeypatch: pytest.MonkeyPatch):
    """Of 200 inner features, eight at a time and fewer later, beside one at a time and all at once."""
    weight, inputs = random(60, 200, seed=0), correlated(200, 600)
    gram = inputs @ inputs.mT

    def losses(chunk: int) -> Tensor:
        monkeypatch.setattr(narrowing, "CHUNK", chunk)
        order = inner_order(weight, gram)
        assert order.sort().values.tolist() == list(range(200))
        return narrowing_tails(weight, gram, order)[[160, 120, 80, 40]]

    one_by_one = losses(200)
    assert bool((losses(24) / one_by_one - 1 < 0.25 * (losses(1) / one_by_one - 1)).all())


def test_elimination_is_near_the_best_subset_and_better_than_the_largest_products():
    """Mean logarithm of the loss over that of the best of all subsets of half of the features."""
    greedy, by_product = [], []
    for seed in range(12):
        weight, inputs = random(OUT, INNER, seed=100 + seed), correlated(seed=10 * seed)
        gram = inputs @ inputs.mT
        products = gram.diagonal() * weight.square().sum(0)
        best = min(least_loss(weight, inputs, list(kept)) for kept in combinations(range(INNER), INNER // 2))
        for order, losses in ((inner_order(weight, gram), greedy), (products.argsort(descending=True), by_product)):
            losses.append(float(narrowing_tails(weight, gram, order)[INNER // 2]) / best)
    assert min(greedy) > 0.999
    assert np.log(greedy).mean() < 0.5 * np.log(by_product).mean()
    assert np.log(greedy).mean() < 0.2


def test_features_that_are_always_zero_go_first():
    weight, inputs = random(OUT, INNER, seed=0), correlated()
    inputs[[2, 6]] = 0
    gram = inputs @ inputs.mT
    order = inner_order(weight, gram)
    assert set(order[-2:].tolist()) == {2, 6}
    assert bool(torch.isfinite(refitted(weight, gram, order[:INNER])).all())
    assert narrowing_tails(weight, gram, order)[-3] < 1e-4 * narrowing_tails(weight, gram, order)[-4]


def test_low_precision_weights_are_computed_in_float64():
    weight, inputs = random(OUT, INNER, seed=0).bfloat16(), correlated()
    gram = inputs @ inputs.mT
    order = inner_order(weight, gram)
    assert torch.equal(order, inner_order(weight.double(), gram))
    assert torch.equal(refitted(weight, gram, order[:4]), refitted(weight.double(), gram, order[:4]))
    assert refitted(weight, gram, order[:4]).dtype == torch.float64


def test_a_gram_that_is_none_is_refused():
    with pytest.raises(torch.linalg.LinAlgError):
        inner_order(random(OUT, INNER, seed=0), -torch.eye(INNER))


def test_a_gram_of_few_tokens_in_float32_has_an_order():
    """Fewer tokens than features, of which one is large: rounding makes eigenvalues negative beyond the first ridge."""
    inputs_IT = random(200, 20, seed=1).float() + 30
    gram_II = inputs_IT @ inputs_IT.mT
    gram_II = (gram_II + gram_II.mT) / 2
    assert float(torch.linalg.eigvalsh(gram_II.double())[0]) < 0
    weight_OI = random(OUT, 200, seed=0)
    order = inner_order(weight_OI, gram_II)
    assert sorted(order.tolist()) == list(range(200))
    tails = narrowing_tails(weight_OI, gram_II, order)
    assert bool((tails.diff() <= 0).all())
    assert bool(torch.isfinite(refitted(weight_OI, gram_II, order[:50])).all())


def test_kept_rows_of_one_and_of_two_copies():
    order = torch.tensor([3, 0, 2, 1])
    assert kept_rows(order, 2).tolist() == [3, 0]
    assert kept_rows(order, 3, copies=2).tolist() == [3, 0, 2, 7, 4, 6]
    assert kept_rows(order, 3, copies=2, interleaved=True).tolist() == [6, 7, 0, 1, 4, 5]


def test_the_order_does_not_depend_on_how_many_rows_move_at_once(monkeypatch: pytest.MonkeyPatch):
    weight, inputs = random(OUT, 30, seed=0), correlated(30, 90)
    whole = inner_order(weight, inputs @ inputs.mT)
    monkeypatch.setattr(narrowing, "ROWS", 4)
    assert inner_order(weight, inputs @ inputs.mT).equal(whole)
    assert inner_order(weight.float(), (inputs @ inputs.mT).float()).equal(whole)
