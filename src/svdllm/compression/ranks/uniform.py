"""Uniform ranks: every linear loses the same share of its parameters, as in the paper."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import floor
from typing import Any

from svdllm.compression.forms import factors_of
from svdllm.compression.forms.layout import params
from svdllm.compression.ranks.question import Allocation, Evidence, Question, RankCost, Ranks
from svdllm.compression.ranks.rows import Row, multiples
from svdllm.models.chosen import Chosen
from svdllm.models.structure import Target

PAIRS = ("pair",)


def pair_params(target: Target, rank: int | None) -> int:
    """Parameters of a target as a pair of a rank, or dense (None)."""
    return params(target, None if rank is None else Chosen("pair", rank))


def uniform_rank(target: Target, ratio: float, round_to: int = 1, forms: Collection[str] = PAIRS) -> int:
    """The largest multiple of ``round_to`` whose factors keep ``1 - ratio`` of the parameters; may be 0.

    For a pair it is ``floor((1 - ratio) d n / (d + n))``.
    """
    steps = len(factors_of(target, forms).sizes(target, round_to))
    return min(exact_floor(_exact_rank(target, ratio, forms) / round_to), steps) * round_to


def uniform_ranks(targets: Sequence[Target], ratio: float, round_to: int = 1, forms: Collection[str] = PAIRS) -> Ranks:
    """The paper's allocation."""
    return {target.name: uniform_rank(target, ratio, round_to, forms) for target in targets}


def fill_budget(
    targets: Sequence[Target],
    budget: int,
    round_to: int = 1,
    cost: RankCost = pair_params,
    forms: Collection[str] = PAIRS,
) -> Ranks | None:
    """Uniform ranks whose total cost is at most ``budget`` and within one rank step of it.

    Args:
        targets: what is compressed.
        budget: what may be spent on the factors of all targets.
        round_to: ranks are multiples of this, and at least this.
        cost: of a target's factors, in the unit of the budget; parameters of a pair by default.
        forms: that may be used; see ``factors_of``.

    Returns:
        The ranks, or None where not even the least ranks fit. A target that has no such rank gets rank 0.
    """
    most = {t.name: len(factors_of(t, forms).sizes(t, round_to)) * round_to for t in targets}

    def ranks_at(ratio: float) -> Ranks:
        return {t.name: min(max(uniform_rank(t, ratio, round_to, forms), round_to), most[t.name]) for t in targets}

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
    by_loss = sorted(targets, key=lambda t: (ranks[t.name] - _exact_rank(t, high, forms), t.name))
    spent = True
    while spent:
        spent = False
        for target in by_loss:
            rank = ranks[target.name]
            if rank + round_to > most[target.name]:
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


def _exact_rank(target: Target, ratio: float, forms: Collection[str]) -> float:
    form = factors_of(target, forms)
    assert form.exact_rank is not None
    return form.exact_rank(target, (1 - ratio) * target.num_weights)


def _allocate(question: Question, evidence: Evidence, settings: Any) -> Allocation:
    if question.ratio is not None:
        ranks = uniform_ranks(question.targets, question.ratio, question.round_to, question.forms)
        return Allocation(question.in_forms(ranks))
    unit, least = question.unit, multiples(question, settings)
    ranks = fill_budget(question.targets, unit.left, question.round_to, question.cost, question.forms)
    if ranks is None:
        raise unit.cannot_be_met(unit.total(question.targets, least.forms), least)
    return Allocation(question.in_forms(ranks))


UNIFORM = Row(
    name="uniform",
    summary="one ratio for all, as in the paper",
    source="SVD-LLM, arXiv 2403.07378",
    allocate=_allocate,
    budgets=("ratio", "target_params", "target_size", "ranks"),
    other_forms=("packed",),
    needs_spectra=False,
    leaves_dense=False,
)
