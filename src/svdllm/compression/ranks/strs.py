"""ASVD's search for ranks (STRS, arXiv 2312.05821): one bound on the loss for all linears.

Each linear was truncated alone to the ranks of a few ratios, and the model's loss on a text measured. At a threshold
each takes the least of these ranks whose loss is not above it, or stays dense where none is. The least threshold whose
ranks fit the budget is found by bisection: a higher one never costs more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

from svdllm.compression.ranks.uniform import Cost, Ranks, uniform_rank
from svdllm.models.structure import Target


def candidate_ranks(target: Target, ratios: Iterable[float], round_to: int) -> list[int]:
    """The distinct ranks above zero that leave ``1 - ratio`` of the parameters, ascending; none for a tiny target."""
    return sorted({uniform_rank(target, ratio, round_to) for ratio in ratios} - {0})


def strs_ranks(
    targets: Sequence[Target], losses: Mapping[str, Mapping[int, float]], budget: int, cost: Cost = Target.params
) -> tuple[Ranks, float | None] | None:
    """The ranks of the least threshold that fits a budget.

    Args:
        targets: what is compressed.
        losses: target -> rank -> loss of the model with this target alone at this rank; all ranks below break-even.
        budget: what may be spent on all targets; never exceeded.
        cost: of a target's factors, or of its dense matrix, in the unit of the budget; parameters by default.

    Returns:
        The ranks of the targets that do not stay dense, and the threshold (None where all may stay dense); None where
        not even the least ranks fit.
    """

    def ranks_at(threshold: float) -> Ranks:
        passing = {t.name: [rank for rank, loss in losses[t.name].items() if loss <= threshold] for t in targets}
        return {name: min(ranks) for name, ranks in passing.items() if ranks}

    def fits(threshold: float) -> bool:
        ranks = ranks_at(threshold)
        return budget >= sum(cost(t, ranks.get(t.name)) for t in targets)

    if fits(float("-inf")):
        return {}, None
    thresholds = sorted({loss for target in targets for loss in losses[target.name].values()})
    position = bisect_left(thresholds, True, key=fits)
    return None if position == len(thresholds) else (ranks_at(thresholds[position]), thresholds[position])
