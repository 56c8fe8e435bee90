"""Uniform ranks: every linear loses the same share of its parameters, as in the paper."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor
from typing import Any

from svdllm.compression.ranks.question import Allocation, Cost, Evidence, Question, Ranks
from svdllm.compression.ranks.rows import Row, multiples
from svdllm.models.structure import Target


def uniform_rank(target: Target, ratio: float, round_to: int = 1) -> int:
    """``floor((1 - ratio) d n / (d + n))``, down to a multiple of ``round_to``; may be 0."""
    exact = _exact_rank(target, ratio)
    return min(exact_floor(exact / round_to) * round_to, target.break_even_rank // round_to * round_to)


def uniform_ranks(targets: Sequence[Target], ratio: float, round_to: int = 1) -> Ranks:
    """The paper's allocation."""
    return {target.name: uniform_rank(target, ratio, round_to) for target in targets}


def fill_budget(targets: Sequence[Target], budget: int, round_to: int = 1, cost: Cost = Target.params) -> Ranks | None:
    """Uniform ranks whose total cost is at most ``budget`` and within one rank step of it.

    Args:
        targets: what is compressed.
        budget: what may be spent on the factors of all targets.
        round_to: ranks are multiples of this, and at least this.
        cost: of a target's factors, in the unit of the budget; parameters by default.

    Returns:
        The ranks, or None where not even the least ranks fit. A target whose least rank is not below break-even gets
        rank 0.
    """

    def ranks_at(ratio: float) -> Ranks:
        return {
            t.name: max(uniform_rank(t, ratio, round_to), round_to) if round_to <= t.break_even_rank else 0
            for t in targets
        }

    def total(ranks: Ranks) -> int:
        return sum(cost(t, ranks[t.name]) for t in targets if ranks[t.name])

    low, high = 0.0, 1.0  # ratio 1 costs least
    if total(ranks_at(high)) > budget:
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if total(ranks_at(middle)) <= budget else (middle, high)
    ranks = ranks_at(high)
    left = budget - total(ranks)
    # The rest goes in steps to the targets that lost most by rounding.
    by_loss = sorted(targets, key=lambda t: (ranks[t.name] - _exact_rank(t, high), t.name))
    spent = True
    while spent:
        spent = False
        for target in by_loss:
            rank = ranks[target.name]
            if rank + round_to > target.break_even_rank:
                continue
            step = cost(target, rank + round_to) - cost(target, rank)
            if step <= left:
                ranks[target.name] += round_to
                left -= step
                spent = True
    return ranks


def exact_floor(value: float) -> int:
    """Floor of a value that rounding may have moved off an integer, as in ``0.29 * 100 == 28.999999999999996``."""
    nearest = round(value)
    return nearest if abs(value - nearest) < 1e-9 * max(1.0, abs(value)) else floor(value)


def _exact_rank(target: Target, ratio: float) -> float:
    weights = (1 - ratio) * target.num_weights - target.added_params
    return max(0.0, weights) / (target.in_features + target.out_features)


def _allocate(question: Question, evidence: Evidence, settings: Any) -> Allocation:
    if question.ratio is not None:
        return Allocation(uniform_ranks(question.targets, question.ratio, question.round_to))
    unit, least = question.unit, multiples(question, settings)
    ranks = fill_budget(question.targets, unit.left, question.round_to, unit.cost)
    if ranks is None:
        raise unit.cannot_be_met(unit.total(question.targets, least.ranks), least)
    return Allocation(ranks)


UNIFORM = Row(
    name="uniform",
    summary="one ratio for all, as in the paper",
    source="SVD-LLM, arXiv 2403.07378",
    allocate=_allocate,
    budgets=("ratio", "target_params", "target_size", "ranks"),
    needs_spectra=False,
    leaves_dense=False,
)
