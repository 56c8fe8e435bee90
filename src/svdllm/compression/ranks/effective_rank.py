"""The ranks of D-Rank (arXiv 2509.25622): by the effective rank of each target, from the spectra alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from math import exp
from typing import Any

import torch
from torch import Tensor

from svdllm.common.errors import InputError
from svdllm.compression.ranks.question import Allocation, Evidence, Question, RankCost, Ranks
from svdllm.compression.ranks.rows import Row
from svdllm.compression.ranks.uniform import pair_params
from svdllm.models.structure import Target

# Share of the parameters of a block's q and k that goes to its v.
SHIFT = 0.3
# Endings of the names of such targets.
ROLES = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "query": "q", "key": "k", "value": "v"}


def effective_ranks(
    targets: Sequence[Target],
    energies: Mapping[str, Tensor],
    budget: int,
    round_to: int = 1,
    cost: RankCost = pair_params,
    *,
    shift: float = SHIFT,
) -> Ranks:
    """Ranks proportional to ``sqrt(R / (d + n))``, where ``R`` is the effective rank of a ``d x n`` target.

    These ranks minimise ``sum(R / rank)`` at a given cost. A target whose share reaches the price of the dense matrix
    stays dense. What it does not need goes to the others, and so does what rounding leaves. Then the share ``shift`` of
    what q and k of a group have moves to its v, in the unit of the budget, until v is dense at most. Groups without
    such names do not change.

    Args:
        targets: what is compressed.
        energies: target -> eigenvalues of ``W C W^T`` (``K``).
        budget: what may be spent on all targets; never exceeded.
        round_to: ranks are multiples of this, and at least this.
        cost: of a target's factors, or of its dense matrix, in the unit of the budget; parameters by default. The cost
            of the dense matrix divided by the ``d n / (d + n)`` ranks of its size takes the place of ``d + n``.
        shift: the share of q and k that goes to v.

    Returns:
        The ranks of the targets that do not stay dense, all below break-even.

    Raises:
        InputError: not even the least ranks fit; tells what they cost.
    """
    dense = {t.name: cost(t, None) for t in targets}
    least = {t.name: min(cost(t, round_to), dense[t.name]) for t in targets}
    if sum(least.values()) > budget:
        raise InputError(
            f"A budget of {budget:,} does not pay for the least ranks ({round_to}) of {len(targets)} linears, which "
            f"cost {sum(least.values()):,}. Raise it to that, or compress less."
        )
    of_one = {t.name: dense[t.name] * (t.in_features + t.out_features) / t.num_weights for t in targets}
    weights = {t.name: (effective_rank(energies[t.name]) * of_one[t.name]) ** 0.5 for t in targets}
    shares = _proportional(weights, least, dense, budget)
    _shift_to_values(targets, shares, least, dense, shift)
    prices = {t.name: _prices(t, round_to, cost) for t in targets}
    return _rounded(targets, shares, prices, of_one, budget, round_to)


def effective_rank(energies_K: Tensor) -> float:
    """``exp`` of the entropy of the normalised energies: 1 for a single direction, ``K`` for equal ones."""
    total = energies_K.double().sum()
    if total <= 0:
        return 1.0
    return exp(float(torch.special.entr(energies_K.double() / total).sum()))


def _proportional(
    weights: Mapping[str, float], least: Mapping[str, int], dense: Mapping[str, int], budget: int
) -> dict[str, float]:
    """The budget shared out in proportion to the weights; a share lies between the least and the dense price."""

    def at(scale: float) -> dict[str, float]:
        return {name: min(max(scale * weights[name], least[name]), dense[name]) for name in weights}

    if sum(dense.values()) <= budget:
        return {name: float(price) for name, price in dense.items()}
    low, high = 0.0, max(dense[name] / weights[name] for name in weights)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle).values()) <= budget else (low, middle)
    return at(low)


def _shift_to_values(
    targets: Sequence[Target],
    shares: dict[str, float],
    least: Mapping[str, int],
    dense: Mapping[str, int],
    shift: float,
) -> None:
    groups: dict[str, dict[str, list[str]]] = {}
    for target in targets:
        role = _role(target.name)
        if role is not None:
            groups.setdefault(target.group, {}).setdefault(role, []).append(target.name)
    for roles in groups.values():
        givers = roles.get("q", []) + roles.get("k", [])
        if len(roles.get("v", [])) != 1 or not givers:
            continue
        value = roles["v"][0]
        offers = {name: min(shift * shares[name], shares[name] - least[name]) for name in givers}
        offered = sum(offers.values())
        taken = min(offered, dense[value] - shares[value])
        if taken > 0:
            for name, offer in offers.items():
                shares[name] -= offer * taken / offered
            shares[value] += taken


def _role(name: str) -> str | None:
    return next((role for ending, role in ROLES.items() if name.endswith(ending)), None)


def _prices(target: Target, round_to: int, cost: RankCost) -> list[int]:
    """The prices of the ranks that are cheaper than the dense matrix, ascending, then the price of the dense matrix."""
    dense = cost(target, None)
    factors = [cost(target, rank) for rank in range(round_to, target.break_even_rank + 1, round_to)]
    return [*(price for price in factors if price < dense), dense]


def _rounded(
    targets: Sequence[Target],
    shares: Mapping[str, float],
    prices: Mapping[str, list[int]],
    of_one: Mapping[str, float],
    budget: int,
    round_to: int,
) -> Ranks:
    """Multiples of ``round_to``, or dense. The rest goes in steps to the targets that lost most by rounding."""
    # A share that equals a price but for its last bits buys the rank of this price.
    levels = {name: bisect_right(prices[name], shares[name] * (1 + 1e-13)) - 1 for name in prices}
    left = budget - sum(prices[name][level] for name, level in levels.items())
    lost = {name: (shares[name] - prices[name][level]) / of_one[name] for name, level in levels.items()}
    spent = True
    while spent:
        spent = False
        for name in sorted(prices, key=lambda name: (-lost[name], name)):
            following = prices[name][levels[name] + 1 : levels[name] + 2]
            if following and following[0] - prices[name][levels[name]] <= left:
                left -= following[0] - prices[name][levels[name]]
                levels[name] += 1
                spent = True
    return {t.name: (levels[t.name] + 1) * round_to for t in targets if levels[t.name] < len(prices[t.name]) - 1}


def _allocate(question: Question, evidence: Evidence, settings: Any) -> Allocation:
    unit = question.unit
    ranks = effective_ranks(question.targets, evidence.energies, unit.left, question.round_to, question.cost)
    return Allocation(question.in_forms(ranks))


EFFECTIVE_RANK = Row(
    name="effective-rank",
    summary="D-Rank: by the entropy of each spectrum",
    source="D-Rank, arXiv 2509.25622",
    allocate=_allocate,
)
