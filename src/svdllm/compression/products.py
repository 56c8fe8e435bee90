"""The products of a group's inputs in the dense and in the compressed stream, from which linears are fitted."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from svdllm.compression.math.statistics import CrossGram, Gram

# Share of the mean diagonal that is added to a Gram, so that a text with fewer directions than inputs can be fitted to.
RIDGE = 1e-6


class Products(NamedTuple):
    """Sums over the tokens of a group's inputs ``X`` (dense stream) and ``X'`` (compressed stream); float64."""

    dense_II: Tensor  # C = X X^T
    compressed_II: Tensor  # S' = X' X'^T
    cross_II: Tensor  # K = X X'^T
    dense_sum_I: Tensor
    compressed_sum_I: Tensor
    num_tokens: int

    def plus(self, other: Products) -> Products:
        sums = {name: ours + theirs for name, ours, theirs in zip(self._fields, self, other, strict=True)}
        return self._replace(**sums)

    def centred(self) -> Products:
        """The products of the inputs less their means, for a weight whose bias corrects the means."""
        dense_I, compressed_I, count = self.dense_sum_I, self.compressed_sum_I, max(self.num_tokens, 1)
        return self._replace(
            dense_II=self.dense_II - torch.outer(dense_I, dense_I) / count,
            compressed_II=self.compressed_II - torch.outer(compressed_I, compressed_I) / count,
            cross_II=self.cross_II - torch.outer(dense_I, compressed_I) / count,
        )

    def mixed_with(self, gram_II: Tensor, share: float) -> Products:
        """Mixes ``share`` of a dense Gram into ``S'`` and ``K`` alike: the weight is kept where the two streams agree.

        Args:
            gram_II: ``C`` over other tokens, scaled to the number of these.
        """
        return self._replace(
            compressed_II=(1 - share) * self.compressed_II + share * gram_II,
            cross_II=(1 - share) * self.cross_II + share * gram_II,
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
        )


class Sums:
    """Accumulates the products of a group batch by batch."""

    def __init__(self, in_features: int, device: torch.device):
        self.dense, self.compressed = Gram(in_features, device), Gram(in_features, device)
        self.cross = CrossGram(in_features, device)

    def add(self, dense: Tensor, compressed: Tensor) -> None:
        self.dense.add(dense)
        self.compressed.add(compressed)
        self.cross.add(dense, compressed)

    def value(self) -> Products:
        count = self.dense.num_tokens
        return Products(
            dense_II=self.dense.value(),
            compressed_II=self.compressed.value(),
            cross_II=self.cross.value(),
            dense_sum_I=self.dense.mean() * count,
            compressed_sum_I=self.compressed.mean() * count,
            num_tokens=count,
        )


def relative_error(weight_OI: Tensor, product_OI: Tensor, products: Products) -> float:
    """``||W X - W' X'||_F^2 / ||W X||_F^2``, computed from the products."""
    dense = (weight_OI @ products.dense_II * weight_OI).sum()
    cross = (weight_OI @ products.cross_II * product_OI).sum()
    compressed = (product_OI @ products.compressed_II * product_OI).sum()
    return float((dense - 2 * cross + compressed) / dense.clamp_min(torch.finfo(torch.float64).tiny))
