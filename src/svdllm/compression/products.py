"""The products of a group's inputs in the dense and in the compressed stream, from which linears are fitted.

``R`` is what the output of a linear is added to, in the dense stream, less the same in the compressed stream: the error
that the linears before it have left in the residual stream, of which this one can make up a part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from svdllm.common.processes import Processes
from svdllm.compression.math.statistics import CrossGram, Gram, weighted
from svdllm.compression.math.totals import Total

# Share of the mean diagonal that is added to a Gram, so that a text with fewer directions than inputs can be fitted to.
RIDGE = 1e-6


# Where a linear's output is added to nothing: zero, whatever the shape.
NOTHING = torch.zeros((), dtype=torch.float64)


class Products(NamedTuple):
    """Sums over the tokens of a group's inputs ``X`` (dense stream) and ``X'`` (compressed stream); float64."""

    compressed_II: Tensor  # S' = X' X'^T
    cross_II: Tensor  # K = X X'^T
    dense_sum_I: Tensor
    compressed_sum_I: Tensor
    weight: float  # number of tokens, or of an expert the sum of the squares of their routing weights
    num_tokens: int
    residual_OI: Tensor = NOTHING  # R X'^T
    residual_sum_O: Tensor = NOTHING

    @property
    def residual(self) -> Tensor | None:
        """``R X'^T``, or None where the output is added to nothing."""
        return self.residual_OI if self.residual_OI.ndim else None

    def centred(self) -> Products:
        """The products of the inputs less their means, for a weight whose bias corrects the means."""
        dense_I, compressed_I, count = self.dense_sum_I, self.compressed_sum_I, self.weight or 1
        return self._replace(
            compressed_II=self.compressed_II - torch.outer(compressed_I, compressed_I) / count,
            cross_II=self.cross_II - torch.outer(dense_I, compressed_I) / count,
            residual_OI=self.residual_OI - self.residual_sum_O[..., None] * compressed_I / count,
        )

    def mixed_with(self, gram_II: Tensor, share: float) -> Products:
        """Mixes ``share`` of a dense Gram into ``S'`` and ``K`` alike, as of tokens whose streams do not differ.

        Args:
            gram_II: ``C`` over other tokens, scaled to the number of these.
        """
        return self._replace(
            compressed_II=(1 - share) * self.compressed_II + share * gram_II,
            cross_II=(1 - share) * self.cross_II + share * gram_II,
            residual_OI=(1 - share) * self.residual_OI,
        )

    def shrunk(self, amount: float) -> Products:
        """Mixes ``amount`` of the diagonal of ``S'`` into ``S'`` and ``K`` alike, and makes ``S'`` positive definite.

        If ``K = S'``, the regression still returns the weight.
        """
        diagonal_I = self.compressed_II.diagonal()
        ridge = RIDGE * diagonal_I.mean().clamp_min(torch.finfo(torch.float64).tiny)
        kept_II = torch.diag(amount * diagonal_I + ridge)
        return self._replace(
            compressed_II=(1 - amount) * self.compressed_II + kept_II,
            cross_II=(1 - amount) * self.cross_II + kept_II,
            residual_OI=(1 - amount) * self.residual_OI,
        )


class Sums:
    """Accumulates the products of a group batch by batch."""

    def __init__(self, in_features: int, device: torch.device):
        self.compressed = Gram(in_features, device)
        self.dense_sum = Total(in_features, device=device)
        self.cross = CrossGram(in_features, in_features, device)
        self.residual: CrossGram | None = None
        self.residual_sum: Total | None = None

    def add(
        self,
        dense: Tensor,
        compressed: Tensor,
        residual: Tensor | None = None,
        weights_T: Tensor | None = None,
    ) -> None:
        """Adds the inputs (``..., in``) in both streams, and ``R`` (``..., out``) where the output is added to one.

        Args:
            weights_T: scale the tokens of an expert.
        """
        self.compressed.add(compressed, weights_T)
        if weights_T is None:
            self.dense_sum.shard.add_(dense.flatten(0, -2).sum(0, dtype=torch.float64))
            self.cross.add(dense, compressed)
        else:
            self.dense_sum.shard.add_(weights_T.double().square() @ dense.double())
            self.cross.add(weighted(dense, weights_T), weighted(compressed, weights_T))
        if residual is not None:
            out_features, in_features = residual.shape[-1], compressed.shape[-1]
            self.residual = self.residual or CrossGram(out_features, in_features, residual.device)
            self.residual.add(residual, compressed)
            self.residual_sum = self.residual_sum or Total(out_features, device=residual.device)
            self.residual_sum.shard.add_(residual.flatten(0, -2).sum(0, dtype=torch.float64))

    @property
    def is_folded(self) -> bool:
        """Whether nothing was added since the last ``fold``."""
        return self.dense_sum.is_folded

    def fold(self, processes: Processes) -> None:
        """Adds what the processes have collected since they last did; see ``Total.fold``."""
        for sums in (self.compressed, self.dense_sum, self.cross, self.residual, self.residual_sum):
            if sums is not None:
                sums.fold(processes)

    def value(self) -> Products:
        device = self.dense_sum.value().device
        return Products(
            compressed_II=self.compressed.value(),
            cross_II=self.cross.value(),
            dense_sum_I=self.dense_sum.value(),
            compressed_sum_I=self.compressed.total(),
            weight=self.compressed.total_weight,
            num_tokens=self.compressed.num_tokens,
            residual_OI=NOTHING.to(device) if self.residual is None else self.residual.value(),
            residual_sum_O=NOTHING.to(device) if self.residual_sum is None else self.residual_sum.value(),
        )
