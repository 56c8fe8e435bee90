"""What an allocation is chosen by, and what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from svdllm.allocation.loss import predicted_losses
from svdllm.allocation.uniform import Ranks
from svdllm.structure import Target


@dataclass(frozen=True)
class Probe:
    """``divergence`` (nats per token) is what truncation to ``rank`` alone does to the model's predictions."""

    rank: int
    divergence: float


@dataclass(frozen=True)
class Evidence:
    """Of every target: its eigenvalues (descending) and, if it was probed, its probe."""

    energies: Mapping[str, Tensor]
    probes: Mapping[str, Probe] = field(default_factory=dict)

    def losses(self, target: Target) -> Tensor:
        """The predicted loss of a target at every rank (nats per token)."""
        probe = self.probes[target.name]
        return predicted_losses(self.energies[target.name], probe.rank, probe.divergence)


@dataclass(frozen=True)
class Allocation:
    """Ranks, and, where they were chosen by predicted loss, that loss and how far it may be from the least possible."""

    ranks: Ranks
    predicted_loss: float | None = None
    gap: float | None = None
