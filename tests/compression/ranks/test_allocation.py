"""Allocations: STRS against brute force, SVD-LLM V2 and D-Rank against a few lines of numpy."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from runs import pair_params, pairs, target
from svdllm.common.errors import InputError
from svdllm.compression.forms.layout import params as form_params
from svdllm.compression.ranks.effective_rank import SHIFT, effective_rank, effective_ranks
from svdllm.compression.ranks.knapsack import Choice
from svdllm.compression.ranks.loss import Losses, least_loss, units_of, weighted_by_block
from svdllm.compression.ranks.question import Evidence, Question, RankCost
from svdllm.compression.ranks.question import Unit as Budget
from svdllm.compression.ranks.strs import candidate_ranks, strs_ranks
from svdllm.compression.ranks.uniform import pair_params as cost_of_pair
from svdllm.compression.ranks.uniform import uniform_ranks
from svdllm.compression.ranks.v2 import spread_ratio, v2_ranks
from svdllm.models.chosen import Chosen
from svdllm.models.structure import Target


def size(linear: Target) -> int:
    return linear.in_features + linear.out_features


def params(targets: list[Target], ranks: dict[str, int]) -> int:
    return sum(pair_params(t, ranks[t.name]) if t.name in ranks else t.num_weights for t in targets)


def in_units_of(size: int) -> RankCost:
    return lambda linear, rank: size * cost_of_pair(linear, rank)


def spectrum(generator: np.random.Generator, length: int) -> Tensor:
    return torch.tensor(np.exp(-generator.uniform(0, 3) * np.arange(length)) * generator.lognormal(3, 3))


# --- loss ---


def test_every_rank_below_break_even_is_offered_and_dense():
    """A 10 x 10 linear has 20 parameters a rank and 100 dense: rank 4 is smaller, rank 5 is not."""
    linear, losses = target(10, 10), torch.arange(11.0).flip(0)
    offered = [Choice(Chosen("pair", rank), 20 * rank, 10.0 - rank) for rank in (1, 2, 3, 4)]
    dense = Choice(None, 100, 0.0)

    def asked(*targets: Target, round_to: int = 1) -> Question:
        return Question(targets, Budget("--target-params", 100, 0, form_params), ("pair",), round_to=round_to)

    for round_to, ranks in ((1, offered), (2, offered[1::2])):
        (unit,) = units_of(asked(linear, round_to=round_to), Losses({"linear": losses}, {}), Evidence())
        assert unit.alternatives == [{"linear": [dense, *ranks]}]
    # A budget for break-even of one and rank 1 of the other buys that.
    question = asked(target(10, 10, "a"), target(10, 10, "b"))
    solution = least_loss(question, Losses({"a": 100 * losses, "b": losses}, {}), Evidence())
    assert solution is not None
    assert {name: choice.what for name, choice in solution.choices.items()} == pairs({"a": 4, "b": 1})


def test_losses_weigh_more_from_block_to_block():
    """By 0.5, 0.75 and 1 in three blocks, in every form; embeddings and heads stay out of it."""
    targets = [replace(target(10, 10, name), block=block) for block, name in enumerate("abc")]
    head = replace(target(10, 10, "head"), vocabulary="head")
    mlp = {"mlp": [replace(target(10, 10, "d"), block=1)]}
    budget = Budget("--target-params", 100, 0, form_params)
    question = Question(targets, budget, ("packed", "int8", "int8-lr"), mlps=mlp, vocabulary=[head])
    losses = Losses(
        {name: torch.ones(3) for name in ("a", "b", "c", "mlp")},
        {name: {8: 1.0} for name in ("a", "b", "c", "head")},
        {"b": {8: torch.ones(2)}},
    )
    weighted = weighted_by_block(losses, question, 0.5)
    assert {name: each.tolist() for name, each in weighted.by_size.items()} == {
        "a": [0.5] * 3, "b": [0.75] * 3, "c": [1.0] * 3, "mlp": [0.75] * 3
    }  # fmt: skip
    assert weighted.by_bits == {"a": {8: 0.5}, "b": {8: 0.75}, "c": {8: 1.0}, "head": {8: 1.0}}
    assert weighted.corrected["b"][8].tolist() == [0.75, 0.75]


# --- STRS ---


def test_candidate_ranks_by_hand():
    """A 20 x 20 linear has 40 parameters a rank and 400 dense: ratio 0.1 leaves rank 9."""
    tenths = [tenth / 10 for tenth in range(1, 10)]
    assert candidate_ranks(target(20, 20), tenths, 1) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert candidate_ranks(target(20, 20), (0.2, 0.7), 1) == [3, 8]
    assert candidate_ranks(target(20, 20), tenths, 4) == [4, 8]
    assert candidate_ranks(target(20, 20), tenths, 10) == []
    assert candidate_ranks(target(1, 50), tenths, 1) == []


def test_strs_by_hand():
    """Two 20 x 20 linears at 40 a rank and 400 dense. Rank 2 of a loses less than its rank 4, and so is taken first."""
    targets = [target(20, 20, "a"), target(20, 20, "b")]
    losses = {"a": {2: 1.5, 4: 2.0, 8: 1.0}, "b": {2: 5.0, 4: 3.0, 8: 1.2}}
    expected = [
        (800, {}, None),
        (799, {"a": 8}, 1.0),  # 320 + 400
        (720, {"a": 8}, 1.0),
        (719, {"a": 8, "b": 8}, 1.2),  # 640
        (639, {"a": 2, "b": 8}, 1.5),  # 400
        (399, {"a": 2, "b": 4}, 3.0),  # 240
        (239, {"a": 2, "b": 2}, 5.0),  # 160
        (160, {"a": 2, "b": 2}, 5.0),
    ]
    for budget, ranks, threshold in expected:
        assert strs_ranks(targets, losses, budget) == (ranks, threshold)
    assert strs_ranks(targets, losses, 159) is None
    assert strs_ranks([*targets, target(3, 3, "c")], losses | {"c": {}}, 408) == ({"a": 2, "b": 4}, 3.0)


def by_scan(targets: list[Target], losses: dict[str, dict[int, float]], itemsize: int, budget: int) -> Any:
    """Every threshold in turn, from the lowest."""
    for threshold in [None, *sorted({loss for found in losses.values() for loss in found.values()})]:
        ranks = {}
        for t in targets:
            passing = sorted(r for r, loss in losses[t.name].items() if threshold is not None and loss <= threshold)
            ranks |= {t.name: passing[0]} if passing else {}
        if itemsize * params(targets, ranks) <= budget:
            return ranks, threshold
    return None


@pytest.mark.parametrize("seed", range(40))
def test_strs_is_the_first_threshold_of_a_scan_that_fits(seed: int):
    """Losses that need not fall with rank, in part equal; a rising budget lowers the threshold and no rank."""
    generator = np.random.default_rng(seed)
    targets = [target(*generator.integers(3, 60, 2).tolist(), f"t{index}") for index in range(generator.integers(1, 9))]
    round_to, itemsize = int(generator.choice([1, 1, 4])), int(generator.choice([1, 2]))
    ratios = generator.choice([0.1, 0.2, 0.3, 0.5, 0.7, 0.9], 4, replace=False).tolist()
    decimals = int(generator.choice([1, 6]))
    losses = {
        t.name: {rank: round(float(generator.exponential()), decimals) for rank in candidate_ranks(t, ratios, round_to)}
        for t in targets
    }
    dense = itemsize * sum(t.num_weights for t in targets)
    budgets = np.linspace(0, dense, 40).astype(int).tolist()
    found = [strs_ranks(targets, losses, budget, in_units_of(itemsize)) for budget in budgets]
    assert found == [by_scan(targets, losses, itemsize, budget) for budget in budgets]
    assert found[-1] == ({}, None)
    assert all(itemsize * params(targets, f[0]) <= budget for f, budget in zip(found, budgets, strict=True) if f)
    for (ranks, threshold), (more, lower) in itertools.pairwise(filter(None, found)):
        assert lower is None or (threshold is not None and lower <= threshold)
        assert all(ranks[name] <= rank for name, rank in more.items())


# --- SVD-LLM V2 ---


def test_v2_by_hand():
    """Losses e and e^3: s = 1 and 1/3, so the ratios are 2 * 0.4 * 3/4 = 0.6 and 2 * 0.4 * 1/4 = 0.2."""
    assert spread_ratio([math.e, math.e**3], 0.4, 1.0) == pytest.approx([0.6, 0.2])
    assert spread_ratio([1.0, math.e**2], 0.4, 1.0) == pytest.approx([0.6, 0.2])  # scaled so that the least is e
    assert spread_ratio([1e-9, 1e-9 * math.e**2], 0.4, 1.0) == pytest.approx([0.6, 0.2])
    assert spread_ratio([math.e, math.e**3], 0.4, 0.5) == pytest.approx([0.5, 0.3])
    assert spread_ratio([math.e**2, math.e, math.e**4], 0.4, 0.5) == pytest.approx([1.4 / 3, 0.5, 0.7 / 3])
    assert spread_ratio([5.0, 7.0], 0.8, 0.5) == [0.5, 0.5]
    assert spread_ratio([0.0, 0.0], 0.4, 1.0) == [0.4, 0.4]
    poorest, richest = spread_ratio([0.0, 3.0], 0.4, 1.0)
    assert poorest / richest == pytest.approx(1 + math.log(1e12))


@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("ratio", [0.2, 0.35, 0.5])
def test_v2_is_the_rule_of_the_paper_where_nothing_is_clipped(ratio: float, round_to: int):
    generator = np.random.default_rng(0)
    shapes = {"q_proj": (60, 40), "k_proj": (30, 40), "up": (40, 90)}
    targets = [target(*shape, f"l.{block}.{leaf}") for block in range(5) for leaf, shape in shapes.items()]
    energies = {
        t.name: torch.tensor(generator.uniform(50, 5000, t.full_rank)).sort(descending=True)[0] for t in targets
    }
    ranks = v2_ranks(targets, energies, ratio, round_to)
    assert list(ranks) == [t.name for t in targets]
    for leaf, (rows, columns) in shapes.items():
        members = [t.name for t in targets if t.name.endswith(leaf)]
        even = int((1 - ratio) * rows * columns / (rows + columns) / round_to) * round_to
        log_losses = np.array([math.log(math.sqrt(energies[name].numpy()[even:].sum())) for name in members])
        assert log_losses.min() > 1
        ratios = len(members) * ratio / log_losses / (1 / log_losses).sum()
        exact = (1 - ratios) * rows * columns / (rows + columns)
        assert [ranks[name] for name in members] == (exact // round_to * round_to).astype(int).tolist()
        assert [ranks[name] for name in sorted(members, key=lambda m: energies[m][even:].sum())] == sorted(
            ranks[name] for name in members
        )


def test_v2_scales_small_losses():
    """Losses 1 and e^2 count as e and e^3: the ratios are 0.6 and 0.2, of break-even 20.5."""
    targets = [target(41, 41, "0.q"), target(41, 41, "1.q")]
    energies = {"0.q": torch.full((41,), 1 / 29), "1.q": torch.full((41,), math.e**4 / 29)}  # 41 - 12 are cut off
    assert v2_ranks(targets, energies, 0.4) == {"0.q": 8, "1.q": 16}


def test_v2_keeps_types_of_another_shape_or_name_apart():
    """Alone in its type every target has the uniform rank, whatever it loses."""
    targets = [target(40, 40, "0.q"), target(40, 60, "1.q"), target(40, 40, "0.k")]
    energies = {t.name: torch.full((40,), 10.0**i) for i, t in enumerate(targets)}
    assert v2_ranks(targets, energies, 0.4) == uniform_ranks(targets, 0.4)
    same = [*targets, target(40, 40, "2.q")]
    assert v2_ranks(same, {**energies, "2.q": torch.full((40,), 1e6)}, 0.4)["2.q"] > uniform_ranks(same, 0.4)["2.q"]


@pytest.mark.parametrize("seed", range(60))
def test_v2_never_keeps_more_than_the_ratio_leaves(seed: int):
    generator = np.random.default_rng(seed)
    targets, energies = [], {}
    for leaf in "abc"[: generator.integers(1, 4)]:
        shape = tuple(generator.integers(3, 70, 2).tolist())
        for block in range(generator.integers(1, 6)):
            targets.append(target(*shape, f"{block}.{leaf}"))
            energies[f"{block}.{leaf}"] = spectrum(generator, min(shape))
    if seed % 5 == 0:
        energies[targets[0].name] *= 0
    for tenths in range(1, 20):
        ratio, round_to = tenths / 20, int(generator.choice([1, 1, 2, 8]))
        ranks = v2_ranks(targets, energies, ratio, round_to)
        assert params(targets, ranks) <= (1 - Fraction(tenths, 20)) * sum(t.num_weights for t in targets)
        if 0 in ranks.values():
            assert ranks == uniform_ranks(targets, ratio, round_to)
        for t in targets:
            assert ranks[t.name] <= t.break_even_rank
            assert ranks[t.name] % round_to == 0


def test_v2_pays_for_the_least_ranks_with_those_of_others():
    """A 4 x 4 linear that has to keep rank 1 (8 of 16 weights) at a ratio of 0.7 takes it from the large ones."""
    targets = [target(4, 4, "0.a"), target(4, 4, "1.a"), target(10, 10, "0.b"), target(10, 10, "1.b")]
    energies = {t.name: torch.ones(t.full_rank) for t in targets}
    assert uniform_ranks(targets, 0.7) == {"0.a": 0, "1.a": 0, "0.b": 1, "1.b": 1}
    assert v2_ranks(targets, energies, 0.7) == {"0.a": 1, "1.a": 1, "0.b": 1, "1.b": 1}  # 56 of 69.6
    assert v2_ranks(targets, energies, 0.76) == uniform_ranks(targets, 0.76)  # not even those fit 55.68


def test_v2_lowers_the_richest():
    """25 linears that keep 8 of 16 weights leave 15.9 ranks of 82 to two others."""
    small = [target(4, 4, f"{block}.a") for block in range(25)]
    targets = [*small, target(41, 41, "0.b"), target(41, 41, "1.b")]
    energies = {t.name: torch.ones(t.full_rank) for t in targets}
    least = {t.name: 1 for t in small}
    assert v2_ranks(targets, energies, 0.6) == {**least, "0.b": 8, "1.b": 7}
    energies |= {"0.b": torch.full((41,), math.e**4 / 33), "1.b": torch.full((41,), 1 / 33)}  # ratios 0.3 and 0.9
    assert v2_ranks(targets, energies, 0.6) == {**least, "0.b": 13, "1.b": 2}


# --- D-Rank ---


def test_effective_rank_by_hand():
    assert effective_rank(torch.tensor([3.0, 3.0, 3.0, 3.0])) == pytest.approx(4)
    assert effective_rank(torch.tensor([7.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.tensor([0.5, 0.25, 0.25]) * 1e6) == pytest.approx(2**1.5)
    assert effective_rank(torch.zeros(4)) == 1


@pytest.mark.parametrize(
    ("budget", "ranks"),
    [
        (32, {"a": 1, "b": 1}),
        (40, {"a": 1, "b": 1}),  # 26.7 and 13.3, which is less than b's least: 24 and 16
        (48, {"a": 2, "b": 1}),
        (60, {"a": 2, "b": 1}),  # 40 and 20
        (64, {"a": 3, "b": 1}),  # 42.7 and 21.3: what is left goes to a, which lost 0.67 of a rank
        (96, {"b": 2}),  # 64 and 32
        (110, {"b": 2}),  # 64 and, of 73.3, 46
        (112, {"b": 3}),
        (128, {}),
        (10**6, {}),
    ],
)
def test_effective_ranks_by_hand(budget: int, ranks: dict[str, int]):
    """Two 8 x 8 linears at 16 a rank and 64 dense, of effective ranks 4 and 1: a has twice the share of b."""
    targets = [target(8, 8, "a"), target(8, 8, "b")]
    energies = {"a": torch.tensor([5.0, 5, 5, 5, 0, 0, 0, 0]), "b": torch.tensor([1.0] + [0.0] * 7)}
    assert effective_ranks(targets, energies, budget) == ranks
    assert effective_ranks(targets, energies, 2 * budget, cost=in_units_of(2)) == ranks
    with pytest.raises(
        InputError, match=r"A budget of 31 does not pay for the least ranks \(1\) of 2 linears.*cost 32"
    ):
        effective_ranks(targets, energies, 31)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.4])
def test_effective_ranks_are_the_rule_of_the_paper_where_nothing_is_clipped(share: float):
    generator = np.random.default_rng(1)
    targets = [target(*shape, str(i)) for i, shape in enumerate([(200, 300), (300, 120), (150, 150), (90, 400)])]
    energies = {t.name: torch.tensor(generator.uniform(1, 9, t.full_rank)) for t in targets}
    budget = int(share * sum(t.num_weights for t in targets))
    ranks = effective_ranks(targets, energies, budget)
    sizes = np.array([size(t) for t in targets])
    normal = [e.numpy() / e.numpy().sum() for e in energies.values()]
    unscaled = np.sqrt(np.exp([-(p * np.log(p)).sum() for p in normal]) / sizes)
    exact = unscaled * budget / (unscaled * sizes).sum()
    chosen = np.array([ranks[t.name] for t in targets])
    assert (chosen >= np.floor(exact)).all()
    assert (chosen <= np.ceil(exact)).all()
    assert budget - min(sizes) < params(targets, ranks) <= budget


@pytest.mark.parametrize("seed", range(60))
def test_effective_ranks_fit_every_budget_and_use_it(seed: int):
    generator = np.random.default_rng(seed)
    round_to = int(generator.choice([1, 1, 2, 8]))
    leaves = ["q_proj", "k_proj", "v_proj", "o_proj", "c_attn"]
    targets = [
        target(*generator.integers(3, 90, 2).tolist(), f"{block}.{leaf}", group=f"{block}.{leaf in leaves[:3]}")
        for block in range(generator.integers(1, 4))
        for leaf in leaves
    ]
    energies = {t.name: spectrum(generator, t.full_rank) for t in targets}
    itemsize = int(generator.choice([1, 2]))
    cost = in_units_of(itemsize)
    dense = itemsize * sum(t.num_weights for t in targets)
    least = itemsize * sum(min(pair_params(t, round_to), t.num_weights) for t in targets)
    assert effective_ranks(targets, energies, dense, round_to, cost) == {}
    with pytest.raises(InputError, match="does not pay for the least ranks"):
        effective_ranks(targets, energies, least - 1, round_to, cost)
    for budget in [*generator.integers(least, dense, 12).tolist(), least, least + 1, dense - 1]:
        ranks = effective_ranks(targets, energies, budget, round_to, cost)
        spent = itemsize * params(targets, ranks)
        assert spent <= budget
        for t in targets:
            if t.name in ranks:
                rank = ranks[t.name]
                assert round_to <= rank <= t.break_even_rank
                assert rank % round_to == 0
                more = {**ranks, t.name: rank + round_to}
                if rank + round_to > t.break_even_rank:
                    del more[t.name]
                assert itemsize * params(targets, more) > budget, f"{t.name} could have had more than {rank}"


def attention(rows: dict[str, int], block: int = 0) -> list[Target]:
    return [target(out, 200, f"{block}.{leaf}", group=f"{block}.attention") for leaf, out in rows.items()]


def equal_energies(targets: list[Target]) -> dict[str, Tensor]:
    return {t.name: torch.ones(50) for t in targets}


def test_q_and_k_give_to_v_by_hand():
    """Rank 5 each at 40 a rank without the shift; 1.5 of q and of k make rank 8 of v, and 3.5 is rounded."""
    targets = [target(20, 20, f"{leaf}_proj", group="q_proj") for leaf in "qkv"]
    energies = {t.name: torch.ones(20) for t in targets}
    assert effective_ranks(targets, energies, 600) == {"q_proj": 3, "k_proj": 4, "v_proj": 8}
    assert effective_ranks(targets, energies, 600, shift=0.0) == {"q_proj": 5, "k_proj": 5, "v_proj": 5}
    # 80 of the 192 on offer make v dense (400); q and k keep the rest.
    assert effective_ranks(targets, energies, 960) == {"q_proj": 7, "k_proj": 7}
    # With another linear that has room, what v cannot take is not lost to it: 320 each, of which 80 make v dense.
    more = [*targets, target(20, 20, "o_proj", group="o_proj")]
    energies |= {"o_proj": torch.ones(20)}
    assert effective_ranks(more, energies, 1280) == {"q_proj": 7, "k_proj": 7, "o_proj": 8}


@pytest.mark.parametrize("names", [("q_proj", "k_proj", "v_proj"), ("query", "key", "value")])
def test_the_shift_is_counted_in_parameters(names: tuple[str, str, str]):
    targets = [*attention(dict(zip(names, (200, 60, 50), strict=True))), target(200, 200, "0.o_proj")]
    energies, budget = equal_energies(targets), 20_000
    plain = effective_ranks(targets, energies, budget, shift=0.0)
    shifted = effective_ranks(targets, energies, budget)
    q, k, v, o = targets
    given = SHIFT * (pair_params(q, plain[q.name]) + pair_params(k, plain[k.name]))
    assert pair_params(v, shifted[v.name] - plain[v.name]) == pytest.approx(given, abs=2 * size(v))
    for t in (q, k):
        assert shifted[t.name] == pytest.approx((1 - SHIFT) * plain[t.name], abs=1.5)
    assert abs(shifted[o.name] - plain[o.name]) <= 1


@pytest.mark.parametrize(
    "targets",
    [
        attention({"qkv_proj": 200, "o": 90}),
        attention({"q_proj": 200, "k_proj": 60}),
        attention({"v_proj": 200, "o_proj": 60}),
        attention({"q_proj": 200, "a_v_proj": 60, "b_v_proj": 60}),
        [*attention({"q_proj": 200}, block=0), *attention({"v_proj": 200}, block=1)],
    ],
    ids=["fused", "no v", "no q and k", "two of v", "another block"],
)
def test_nothing_is_shifted_where_the_parts_are_not_known(targets: list[Target]):
    energies: Any = equal_energies(targets)
    assert effective_ranks(targets, energies, 9_000) == effective_ranks(targets, energies, 9_000, shift=0.0)


def test_the_shift_leaves_the_least_rank():
    targets = attention({"q_proj": 200, "k_proj": 200, "v_proj": 200})
    for budget in range(3 * 8 * 400, 3 * 24 * 400, 400):
        ranks = effective_ranks(targets, equal_energies(targets), budget, round_to=8)
        assert min(ranks.values()) >= 8
        assert params(targets, ranks) <= budget
