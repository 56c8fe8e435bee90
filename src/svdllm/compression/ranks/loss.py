"""Ranks of least loss: how truncating each linear changes the predictions, and a knapsack over ranks or dense.

The loss of linear ``i`` at rank ``r`` is ``c_i tail_i(r) / tail_i(r0)``: its spectrum gives the shape, one probe at
``r0`` the height. Linears may stay dense, at no loss and full price.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from svdllm.compression.math.linalg import tail_energies
from svdllm.compression.math.measures import divergence
from svdllm.compression.ranks.knapsack import Choice, Solution, Unit, solve
from svdllm.compression.ranks.probe_settings import ProbeSettings
from svdllm.compression.ranks.question import Allocation, Cost, Evidence, Question
from svdllm.compression.ranks.rows import Probing, Row
from svdllm.models.structure import Target

PROBE_SHARE_OF_BREAK_EVEN = 0.1


def probe_rank(target: Target) -> int:
    """The one rank at which a target is probed: a tenth of break-even."""
    return max(1, round(PROBE_SHARE_OF_BREAK_EVEN * target.break_even_rank))


def predicted_losses(energies_K: Tensor, rank: int, divergence: float) -> Tensor:
    """Loss at every rank (``K + 1`` entries, float64), by one divergence (nats per token) measured at ``rank``."""
    tails = tail_energies(energies_K)
    return tails * (max(divergence, 0.0) / float(tails[rank])) if tails[rank] > 0 else tails * 0


def losses_of(evidence: Evidence, target: Target) -> Tensor:
    """The predicted loss of a target at every rank (nats per token), by its one probe."""
    ((rank, measured),) = evidence.probes[target.name].items()
    return predicted_losses(evidence.energies[target.name], rank, measured)


def loss_choices(target: Target, losses: Tensor, cost: Cost, round_to: int) -> list[Choice[int | None]]:
    """The choices of a target: multiples of ``round_to`` below break-even, and dense."""
    ranks = range(round_to, target.break_even_rank + 1, round_to)
    factorised = [Choice[int | None](rank, cost(target, rank), float(losses[rank])) for rank in ranks]
    return [*factorised, Choice(None, cost(target, None), 0.0)]


def loss_ranks(
    targets: Sequence[Target],
    losses: Mapping[str, Tensor],
    cost: Cost,
    budget: int,
    round_to: int,
) -> Solution[int | None] | None:
    """The choices of least summed loss within a budget, or None where not even the least ranks fit.

    Args:
        targets: what is compressed.
        losses: target -> loss at every rank.
        cost: of a target's factors, or of its dense matrix, in the unit of the budget (parameters, bytes, nanoseconds).
        budget: what may be spent on all targets.
        round_to: ranks are multiples of this.
    """
    units = [Unit([{t.name: loss_choices(t, losses[t.name], cost, round_to)}]) for t in targets]
    return solve(units, budget)


def _allocate(question: Question, evidence: Evidence, settings: Any) -> Allocation:
    losses, unit = {t.name: losses_of(evidence, t) for t in question.targets}, question.unit
    solution = loss_ranks(question.targets, losses, unit.cost, unit.left, question.round_to)
    assert solution is not None  # the least ranks fit
    ranks = {name: choice.what for name, choice in solution.choices.items() if choice.what is not None}
    return Allocation(ranks, predicted_loss=solution.loss, gap=solution.gap)


LOSS = Row(
    name="loss",
    summary="least loss, measured on the model; may leave linears dense",
    source="a probe of each linear, its spectrum, and a multiple-choice knapsack (Pisinger, 1995)",
    allocate=_allocate,
    budgets=("ratio", "target_params", "target_size", "target_speedup"),
    probing=Probing(measure=divergence, ranks=lambda target, round_to, settings: [probe_rank(target)]),
    settings=ProbeSettings,
)
