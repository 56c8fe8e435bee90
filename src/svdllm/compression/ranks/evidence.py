"""What an allocation is chosen by, and what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from svdllm.checkpoint.elastic import Probes
from svdllm.compression.ranks.linear_times import LinearTimes
from svdllm.compression.ranks.loss import predicted_losses
from svdllm.compression.ranks.uniform import Ranks
from svdllm.models.structure import Target


@dataclass(frozen=True)
class Evidence:
    """Of every target: its eigenvalues (descending) and, if it was probed, its probes.

    A probe for ``loss`` is the divergence from the dense model's predictions, one per target; for ``strs`` it is the
    loss of the text, at several ranks. ``times`` are there where time is the budget.
    """

    energies: Mapping[str, Tensor]
    probes: Probes = field(default_factory=dict)
    times: LinearTimes | None = None

    def losses(self, target: Target) -> Tensor:
        """The predicted loss of a target at every rank (nats per token), by its one probe."""
        ((rank, divergence),) = self.probes[target.name].items()
        return predicted_losses(self.energies[target.name], rank, divergence)


@dataclass(frozen=True)
class Allocation:
    """Ranks, and what the rule that chose them says of them.

    By predicted loss: that loss, and how far it may be from the least possible. By STRS: the threshold, which the loss of
    no linear truncated alone exceeds.
    """

    ranks: Ranks
    predicted_loss: float | None = None
    gap: float | None = None
    threshold: float | None = None
