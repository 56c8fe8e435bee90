"""The ranks of SVD-LLM V2 (arXiv 2503.12340, section 3.1): linears of a type that would lose more keep more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import e, floor, log
from typing import Any

from torch import Tensor

from svdllm.compression.math.linalg import tail_energies
from svdllm.compression.ranks.question import Allocation, Evidence, Question, Ranks
from svdllm.compression.ranks.rows import Row
from svdllm.compression.ranks.uniform import pair_params, uniform_rank, uniform_ranks
from svdllm.models.structure import Target

# A loss of zero has no logarithm: losses count as at least this share of the greatest of their type.
LOSS_FLOOR = 1e-12


def v2_ranks(targets: Sequence[Target], energies: Mapping[str, Tensor], ratio: float, round_to: int = 1) -> Ranks:
    """Each type keeps the parameters it has at the uniform ratio, and spreads them by ``1 / log L``.

    A type is the last component of a name together with the shape. ``L`` is ``||W X - W' X||_F`` at the uniform rank;
    ``s = 1 / log L``, and a target's ratio is ``n ratio s / sum(s)`` over the ``n`` targets of its type.

    The paper leaves two cases open. Where a loss of a type is below ``e``, all losses of the type are scaled so that
    the least is ``e``; otherwise ``log L`` could be zero or negative. A ratio that would leave less than the least rank
    is lowered until it leaves the least rank, and the others of the type rise in proportion.

    Args:
        targets: what is compressed.
        energies: target -> eigenvalues of ``W C W^T``, descending (``K``).
        ratio: share of the targets' parameters to remove.
        round_to: ranks are multiples of this, and at least this.

    Returns:
        Ranks from ``round_to`` to break-even that keep at most ``1 - ratio`` of all weights. Where not even the least
        ranks do, or a target has no rank below break-even, the uniform ranks, some of which are then 0.
    """
    uniform = uniform_ranks(targets, ratio, round_to)
    budget = floor((1 - Fraction(str(ratio))) * sum(target.num_weights for target in targets))
    least = sum(pair_params(target, round_to) for target in targets)
    if least > budget or any(round_to > target.break_even_rank for target in targets):
        return uniform
    types: dict[tuple[str, int, int], list[Target]] = {}
    for target in targets:
        leaf = target.name.rpartition(".")[2]
        types.setdefault((leaf, target.out_features, target.in_features), []).append(target)
    ranks: Ranks = {}
    for members in types.values():
        losses = [float(tail_energies(energies[t.name])[uniform[t.name]]) ** 0.5 for t in members]
        highest = 1 - pair_params(members[0], round_to) / members[0].num_weights
        ratios = spread_ratio(losses, ratio, highest)
        ranks |= {t.name: uniform_rank(t, own, round_to) for t, own in zip(members, ratios, strict=True)}
    _lower_to(budget, targets, ranks, round_to)
    return {target.name: ranks[target.name] for target in targets}


def spread_ratio(losses: Sequence[float], ratio: float, highest: float) -> list[float]:
    """The ratios of the targets of one type: proportional to ``1 / log L``, at most ``highest``, on average ``ratio``.

    Where ``ratio`` is above ``highest``, all are ``highest``.
    """
    floored = [max(loss, LOSS_FLOOR * max(losses)) for loss in losses]
    scale = max(1.0, e / min(floored)) if min(floored) > 0 else 0.0
    shares = [1 / log(loss * scale) if scale else 1.0 for loss in floored]
    ratios = [highest] * len(losses)
    left, free = ratio * len(losses), sorted(range(len(losses)), key=lambda i: -shares[i])
    # By falling share: once one is not clipped, none of those after it is.
    for position, index in enumerate(free):
        ratios[index] = min(left * shares[index] / sum(shares[i] for i in free[position:]), highest)
        left -= ratios[index]
    return ratios


def _lower_to(budget: int, targets: Sequence[Target], ranks: Ranks, round_to: int) -> None:
    """Takes one step at a time from the target that keeps the largest share of its break-even rank."""
    cost = sum(pair_params(target, ranks[target.name]) for target in targets)
    while cost > budget:
        able = [target for target in targets if ranks[target.name] > round_to]
        richest = max(able, key=lambda t: (ranks[t.name] / t.break_even_rank, t.name))
        ranks[richest.name] -= round_to
        cost -= round_to * (richest.in_features + richest.out_features)


def _allocate(question: Question, evidence: Evidence, settings: Any) -> Allocation:
    assert question.ratio is not None
    ranks = v2_ranks(question.targets, evidence.energies, question.ratio, question.round_to)
    return Allocation(question.in_forms(ranks))


V2 = Row(
    name="v2",
    summary="SVD-LLM V2: more for those of a type that would lose more",
    source="SVD-LLM V2, arXiv 2503.12340",
    allocate=_allocate,
    budgets=("ratio",),
    leaves_dense=False,
)
