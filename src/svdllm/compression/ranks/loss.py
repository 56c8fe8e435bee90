"""Loss-aware ranks: what truncating each linear does to the predictions, and a knapsack over ranks or dense.

The loss of linear ``i`` at rank ``r`` is ``c_i tail_i(r) / tail_i(r0)``: its spectrum gives the shape, one probe at
``r0`` the height. Linears may stay dense, at no loss and full price.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from svdllm.compression.math.linalg import tail_energies
from svdllm.compression.ranks.knapsack import Choice, Solution, solve
from svdllm.compression.ranks.uniform import Cost
from svdllm.models.structure import Target


def predicted_losses(energies_K: Tensor, rank: int, divergence: float) -> Tensor:
    """Loss at every rank (``K + 1`` entries, float64), by one divergence (nats per token) measured at ``rank``."""
    tails = tail_energies(energies_K)
    return tails * (max(divergence, 0.0) / float(tails[rank])) if tails[rank] > 0 else tails * 0


def loss_choices(target: Target, losses: Tensor, cost: Cost, round_to: int) -> list[Choice]:
    """Multiples of ``round_to`` below break-even, and dense."""
    ranks = range(round_to, target.break_even_rank + 1, round_to)
    factorised = [Choice(rank, cost(target, rank), float(losses[rank])) for rank in ranks]
    return [*factorised, Choice(None, cost(target, None), 0.0)]


def loss_ranks(
    targets: Sequence[Target],
    losses: Mapping[str, Tensor],
    cost: Cost,
    budget: int,
    round_to: int,
) -> Solution | None:
    """The choices of least summed loss within a budget, or None where not even the least ranks fit.

    Args:
        targets: what is compressed.
        losses: target -> loss at every rank.
        cost: of a target's factors, or of its dense matrix, in the unit of the budget (parameters, bytes or nanoseconds).
        budget: what may be spent on all targets.
        round_to: ranks are multiples of this.
    """
    choices = {t.name: loss_choices(t, losses[t.name], cost, round_to) for t in targets}
    return solve(choices, budget)
