"""The products of a group's inputs in the dense and in the compressed stream, from which linears are fitted.

A fit to the dense outputs wants ``beta W (X - X')`` beside what the compressed stream makes, ``W X'``. Its product with
``X'`` is ``beta W D`` for ``D = (X - X') X'^T``. Of a linear that reads more features than it makes, and no other reads
them, that product itself is summed: it has ``out x in`` numbers, ``D`` has ``in x in``.

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
# Rows of a dense Gram that are in float64 at once.
ROWS = 1024

# Where a linear's output is added to nothing: zero, whatever the shape.
NOTHING = torch.zeros((), dtype=torch.float64)


class Products(NamedTuple):
    """Sums over the tokens of a group's inputs ``X`` (dense stream) and ``X'`` (compressed stream); float64."""

    compressed_II: Tensor  # S' = X' X'^T
    difference_II: Tensor  # D = (X - X') X'^T; nothing where it is in the sums of what is missing
    dense_sum_I: Tensor
    compressed_sum_I: Tensor
    weight: float  # number of tokens, or of an expert the sum of the squares of their routing weights
    num_tokens: int
    missing_OI: Tensor = NOTHING  # (R + beta W (X - X')) X'^T where D is not summed, else R X'^T
    missing_sum_O: Tensor = NOTHING
    residual_sum_O: Tensor = NOTHING

    def lacks(self, beta: float) -> bool:
        """Whether the outputs lack anything."""
        return bool(self.missing_OI.ndim or (beta and self.difference_II.ndim))

    def missing(self, weight_OI: Tensor | None, beta: float) -> Tensor | None:
        """``(beta W (X - X') + R) X'^T`` (``O x I``, float64); None where nothing is missing.

        Without a weight, ``beta (X - X') X'^T`` (``I x I``).
        """
        residual_OI = self.missing_OI if self.missing_OI.ndim else None
        if not beta or not self.difference_II.ndim:
            return residual_OI
        missing_OI = beta * (self.difference_II if weight_OI is None else weight_OI.double() @ self.difference_II)
        return missing_OI if residual_OI is None else missing_OI.add_(residual_OI)

    def cloned(self) -> Products:
        """A copy of the matrices, which the methods below change in place."""
        matrices = {name: getattr(self, name).clone() for name in ("compressed_II", "difference_II", "missing_OI")}
        return self._replace(**matrices)

    def free_gram(self) -> None:
        """Gives back the memory of ``S'``, which is not read again."""
        self.compressed_II.untyped_storage().resize_(0)

    def centre(self) -> None:
        """Makes them the products of the inputs less their means, for a weight whose bias corrects the means."""
        dense_I, compressed_I, count = self.dense_sum_I, self.compressed_sum_I, self.weight or 1
        self.compressed_II.addr_(compressed_I, compressed_I, alpha=-1 / count)
        if self.difference_II.ndim:
            self.difference_II.addr_(dense_I - compressed_I, compressed_I, alpha=-1 / count)
        if self.missing_OI.ndim:
            self.missing_OI.addr_(self.missing_sum_O, compressed_I, alpha=-1 / count)

    def mix_in(self, metric_II: Tensor, share: float, *, scale: float, shrinkage: float) -> None:
        """Mixes ``share`` of a dense Gram into ``S'``, as of tokens whose streams do not differ.

        Args:
            metric_II: the Gram of other tokens, any float dtype, with ``shrinkage`` of its diagonal mixed in.
            scale: the number of these tokens, over the number of those.
        """
        kept_I = (1 - share) * self.compressed_II.diagonal()
        self._scale(1 - share)
        factor = share * scale / (1 - shrinkage)
        for rows_RI, metric_RI in zip(self.compressed_II.split(ROWS), metric_II.split(ROWS), strict=True):
            rows_RI.add_(metric_RI.to(rows_RI), alpha=factor)
        self.compressed_II.diagonal().copy_(kept_I + share * scale * metric_II.diagonal().to(kept_I))

    def shrink(self, amount: float) -> None:
        """Mixes ``amount`` of its diagonal into ``S'``, and makes it positive definite.

        Tokens are added in this whose streams do not differ: if ``X = X'``, the regression still returns the weight.
        """
        diagonal_I = self.compressed_II.diagonal()
        added_I = amount * diagonal_I + RIDGE * diagonal_I.mean().clamp_min(torch.finfo(torch.float64).tiny)
        self._scale(1 - amount)
        self.compressed_II.diagonal().add_(added_I)

    def _scale(self, share: float) -> None:
        for product in (self.compressed_II, self.difference_II, self.missing_OI):
            if product.ndim:
                product.mul_(share)


class Sums:
    """Accumulates the products of a group batch by batch.

    Args:
        fitted: the weight (``O x I``) and ``beta`` of the one linear that is fitted, where ``O < I``; ``D`` is not
            summed then.
    """

    def __init__(self, in_features: int, device: torch.device, fitted: tuple[Tensor, float] | None = None):
        self.compressed = Gram(in_features, device)
        self.dense_sum = Total(in_features, device=device)
        self.difference = None if fitted else CrossGram(in_features, in_features, device)
        self.missing: CrossGram | None = None
        self.missing_sum: Total | None = None
        self.residual_sum: Total | None = None
        self._fitted = fitted

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
        difference = dense - compressed
        if weights_T is None:
            self.dense_sum.shard.add_(dense.flatten(0, -2).sum(0, dtype=torch.float64))
        else:
            self.dense_sum.shard.add_(weights_T.double().square() @ dense.double())
            difference, compressed = weighted(difference, weights_T), weighted(compressed, weights_T)
        if self.difference is not None:
            self.difference.add(difference, compressed)
        missing = residual
        if self._fitted is not None and self._fitted[1]:
            weight_OI, beta = self._fitted
            missing = beta * (difference @ weight_OI.mT.to(difference))
            missing = missing if residual is None else missing + residual
        if missing is not None:
            self._add_missing(missing, compressed)
        if residual is not None:
            self.residual_sum = self.residual_sum or Total(residual.shape[-1], device=residual.device)
            self.residual_sum.shard.add_(residual.flatten(0, -2).sum(0, dtype=torch.float64))

    def _add_missing(self, missing: Tensor, compressed: Tensor) -> None:
        out_features, in_features = missing.shape[-1], compressed.shape[-1]
        self.missing = self.missing or CrossGram(out_features, in_features, missing.device)
        self.missing.add(missing, compressed)
        self.missing_sum = self.missing_sum or Total(out_features, device=missing.device)
        self.missing_sum.shard.add_(missing.flatten(0, -2).sum(0, dtype=torch.float64))

    @property
    def is_folded(self) -> bool:
        """Whether nothing was added since the last ``fold``."""
        return self.dense_sum.is_folded

    def fold(self, processes: Processes) -> None:
        """Adds what the processes have collected since they last did; see ``Total.fold``."""
        kept = (self.compressed, self.dense_sum, self.difference, self.missing, self.missing_sum, self.residual_sum)
        for sums in kept:
            if sums is not None:
                sums.fold(processes)

    def value(self) -> Products:
        nothing = NOTHING.to(self.dense_sum.value().device)

        def value_of(sums: Total | CrossGram | None) -> Tensor:
            return nothing if sums is None else sums.value()

        return Products(
            compressed_II=self.compressed.value(),
            difference_II=value_of(self.difference),
            dense_sum_I=self.dense_sum.value(),
            compressed_sum_I=self.compressed.total(),
            weight=self.compressed.total_weight,
            num_tokens=self.compressed.num_tokens,
            missing_OI=value_of(self.missing),
            missing_sum_O=value_of(self.missing_sum),
            residual_sum_O=value_of(self.residual_sum),
        )
