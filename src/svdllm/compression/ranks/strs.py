"""ASVD's search for ranks (STRS, arXiv 2312.05821): one bound on the loss for all linears.

Each linear was truncated alone to the ranks of a few ratios, and the model's loss on a text measured. At a threshold
each takes the least of these ranks whose loss is not above it, or stays dense where none is. The least threshold whose
ranks fit the budget is found by bisection: a higher one never costs more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

from pydantic import Field, field_validator

from svdllm.common.settings import setting
from svdllm.compression.after_analysis import AfterAnalysis
from svdllm.compression.math.measures import cross_entropy
from svdllm.compression.ranks.probe_settings import ProbeSettings
from svdllm.compression.ranks.question import Allocation, Evidence, Least, Question, RankCost, Ranks
from svdllm.compression.ranks.rows import Probing, Row
from svdllm.compression.ranks.uniform import pair_params, uniform_rank
from svdllm.models.structure import Target

Ratio = Annotated[float, Field(gt=0, lt=1)]


class StrsSettings(ProbeSettings):
    """Settings of the allocation strs."""

    strs_ratios: AfterAnalysis[tuple[Ratio, ...]] = setting(
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        "Ratios at which each linear alone is tried (strs); fewer leave more tokens for each.",
        panel="Allocation",
        reader="ratio list",
        min_length=1,
    )

    @field_validator("strs_ratios")
    @classmethod
    def _distinct(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(ratios)) < len(ratios):
            raise ValueError(f"names a value twice: {ratios}")
        return ratios


def candidate_ranks(target: Target, ratios: Iterable[float], round_to: int) -> list[int]:
    """The distinct ranks above zero that leave ``1 - ratio`` of the parameters, ascending; none for a tiny target."""
    return sorted({uniform_rank(target, ratio, round_to) for ratio in ratios} - {0})


def strs_ranks(
    targets: Sequence[Target], losses: Mapping[str, Mapping[int, float]], budget: int, cost: RankCost = pair_params
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


def _least(question: Question, settings: StrsSettings) -> Least:
    candidates = {t.name: candidate_ranks(t, settings.strs_ratios, question.round_to) for t in question.targets}
    ranks = {name: found[0] for name, found in candidates.items() if found}
    highest = max(settings.strs_ratios)
    return Least(question.in_forms(ranks), f"that of ratio {highest}", ", or give a higher ratio in --strs-ratios")


def _allocate(question: Question, evidence: Evidence, settings: StrsSettings) -> Allocation:
    found = strs_ranks(question.targets, evidence.probes, question.unit.left, question.cost)
    assert found is not None  # the least ranks fit
    ranks, threshold = found
    return Allocation(question.in_forms(ranks), threshold=threshold)


STRS = Row(
    name="strs",
    summary="search of ASVD; may leave linears dense",
    source="ASVD, arXiv 2312.05821",
    allocate=_allocate,
    least=_least,
    probing=Probing(
        measure=cross_entropy,
        ranks=lambda target, round_to, settings: candidate_ranks(target, settings.strs_ratios, round_to),
        least_tokens=256,
        advice=", or fewer --strs-ratios",
    ),
    settings=StrsSettings,
)
