"""Removes inner features of an MLP: which to keep, the loss at every width, and the consumer fitted to those kept.

Shape suffixes: ``O`` out_features of the consumer, ``I`` inner features, ``W`` kept ones, ``N`` those not yet removed,
``P`` those removed together.

The consumer ``W`` (``O x I``) reads inner features with the Gram ``C``; ``G = L^T L`` is the metric of its outputs.
With the features ``J`` kept, the least loss is ``min ||L (W X - W' X_J)||_F^2``. The optimum ``W' = W C_:J C_JJ^-1``
does not depend on ``G``. An *order* lists the inner features from the last to be removed to the first: the first ``w``
are kept at width ``w``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from svdllm.compression.math.symmetric import ROWS, cholesky_in_place, solved_by_root

# Shares of the mean diagonal that are added to a Gram: inner features behind a ReLU may be zero on a whole text, and a
# Gram of few tokens, kept in float32, has eigenvalues below zero.
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3)
# The features left are removed a 24th at a time. One at a time takes 20 times as long; the loss is 0.1 % lower.
CHUNK = 24


class Narrowing(NamedTuple):
    """How an MLP is narrowed, for any width."""

    order: Tensor  # (I), the inner features, those first that are kept longest
    tails: Tensor  # (I + 1), float64: squared loss at every width
    gram: Tensor  # (I, I), the right metric, from which the consumer is refitted

    @classmethod
    def of(cls, weight_OI: Tensor, gram_II: Tensor, left_gram_OO: Tensor | None) -> Narrowing:
        """Orders the inner features and computes the loss at every width; see the functions below."""
        order_I = inner_order(weight_OI, gram_II, left_gram_OO)
        return cls(order_I, narrowing_tails(weight_OI, gram_II, order_I, left_gram_OO), gram_II)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Narrowing:
        """Moves it to a device. The Gram gets the ``dtype``; the losses stay float64."""
        return Narrowing(self.order.to(device), self.tails.to(device), self.gram.to(device, dtype))

    def consumer(self, weight_OI: Tensor, width: int) -> Tensor:
        """The refitted weight of the consumer (``O x I``, float64), in which the features removed are zero."""
        kept_W = self.order[:width]
        return with_zeros(refitted(weight_OI, self.gram, kept_W), kept_W, len(self.order))


def with_zeros(weight_OW: Tensor, kept_W: Tensor, width: int) -> Tensor:
    """A weight of all ``width`` inner features (``O x I``) that is zero where they are removed."""
    weight_OI = weight_OW.new_zeros(len(weight_OW), width)
    weight_OI[:, kept_W] = weight_OW
    return weight_OI


def inner_order(weight_OI: Tensor, gram_II: Tensor, left_gram_OO: Tensor | None = None) -> Tensor:
    """Orders the inner features by backward elimination: removes the features that cost least, then the next.

    With the other weights refitted, removing feature ``i`` adds ``(W^T G W)_ii / (C^-1)_ii`` to the loss (the optimal
    brain surgeon, as in arXiv 2302.04089). After each removal, ``C`` and ``W`` are those of the features that are left.

    Args:
        weight_OI: weight of the consumer, any float dtype; computed in float64.
        gram_II: the right metric.
        left_gram_OO: the left metric, positive definite; identity by default.

    Returns:
        The order (``I``), integers.

    Raises:
        torch.linalg.LinAlgError: the Gram is not positive semi-definite, or the left metric not positive definite.
    """
    weight_ON = _in_left_metric(weight_OI.double(), left_gram_OO)
    root_II = _root(gram_II, torch.arange(len(gram_II), device=gram_II.device))
    inverse_NN = torch.cholesky_inverse(root_II, out=root_II).mT  # symmetric, and its rows contiguous
    left_N = torch.arange(len(gram_II), device=gram_II.device)
    removed = []
    while len(left_N):
        ascending_N = (weight_ON.square().sum(0) / inverse_NN.diagonal()).argsort()
        first_P, kept_N = ascending_N.tensor_split([max(1, len(left_N) // CHUNK)])
        kept_N = kept_N.sort().values
        removed.append(left_N[first_P])
        rows_PN = inverse_NN[first_P]
        root_PP = torch.linalg.cholesky(rows_PN[:, first_P])
        columns_PN = torch.linalg.solve_triangular(root_PP, rows_PN[:, kept_N], upper=False)
        losses_PO = torch.linalg.solve_triangular(root_PP, weight_ON[:, first_P].mT, upper=False)
        inverse_NN = _taken(inverse_NN, kept_N, overwrite=True).addmm_(columns_PN.mT, columns_PN, alpha=-1)
        weight_ON = weight_ON[:, kept_N].addmm_(losses_PO.mT, columns_PN, alpha=-1)
        left_N = left_N[kept_N]
    return torch.cat(removed).flip(0)


def narrowing_tails(weight_OI: Tensor, gram_II: Tensor, order_I: Tensor, left_gram_OO: Tensor | None = None) -> Tensor:
    """Squared loss at every width at once: entry ``w`` is the loss with the first ``w`` features of the order.

    With ``C = R R^T`` in this order, ``R`` lower triangular, the loss is ``sum_{j >= w} ||L (W R)_j||^2``.

    Returns:
        ``I + 1`` values, float64; the last is 0.

    Raises:
        torch.linalg.LinAlgError: the Gram is not positive semi-definite, or the left metric not positive definite.
    """
    root_II = _root(gram_II, order_I)
    columns_OI = weight_OI.double()[:, order_I] @ root_II
    losses_I = _in_left_metric(columns_OI, left_gram_OO).square().sum(0)
    return torch.cat([losses_I.flip(0).cumsum(0).flip(0), losses_I.new_zeros(1)])


def refitted(weight_OI: Tensor, gram_II: Tensor, kept_W: Tensor) -> Tensor:
    """``W C_:J C_JJ^-1`` (``O x W``, float64): the weight of the consumer that makes up best for the features removed.

    Args:
        kept_W: the features kept, ``order[:width]``; the columns of the result have this order.

    Raises:
        torch.linalg.LinAlgError: the Gram is not positive semi-definite.
    """
    return narrowed_anchored(weight_OI, gram_II, kept_W)


def narrowed_anchored(
    weight_OI: Tensor, gram_II: Tensor, kept_W: Tensor, missing_OI: Tensor | None = None, *, overwrite: bool = False
) -> Tensor:
    """``(W S' + M X'^T)_:J S'_JJ^-1`` (``O x W``, float64): the consumer, fitted.

    ``S' = X' X'^T`` is the Gram of the inner features that the compressed model makes of the text, those to be removed
    included, and ``M`` is what the outputs ``W X'`` lack. ``W' X'_J`` comes nearest to ``W X' + M``.

    Args:
        kept_W: the features kept, ``order[:width]``; the columns of the result have this order.
        missing_OI: ``M X'^T``; nothing by default.
        overwrite: takes the memory of ``gram_II`` (float64), which is lost.

    Raises:
        torch.linalg.LinAlgError: ``S'`` is not positive semi-definite.
    """
    ascending_W, places_W = kept_W.sort()
    back_W = places_W.argsort()
    removed_I = torch.ones(len(gram_II), dtype=torch.bool, device=gram_II.device)
    removed_I[kept_W] = False
    if missing_OI is None:
        fit_OW = weight_OI.new_zeros(len(weight_OI), len(kept_W), dtype=torch.float64)
    else:
        fit_OW = missing_OI[:, ascending_W]
    for removed_R in removed_I.nonzero().flatten().split(ROWS):
        fit_OW.addmm_(weight_OI[:, removed_R].double(), gram_II[removed_R][:, ascending_W].double())
    root_WW = _root(gram_II, ascending_W, overwrite=overwrite)
    for weight_RI, fit_RW in zip(weight_OI.split(ROWS), fit_OW.split(ROWS), strict=True):
        found_RW = weight_RI[:, ascending_W].double() + solved_by_root(root_WW, fit_RW)
        fit_RW.copy_(found_RW[:, back_W])
    return fit_OW


def kept_rows(order_I: Tensor, width: int, copies: int = 1, interleaved: bool = False) -> Tensor:
    """The rows of a producer that are kept at a width, in the order of the consumer's columns.

    Args:
        copies: out_features of the producer divided by the number of inner features: 2 for gate and up in one linear,
            which has feature ``j`` in the rows ``j`` and ``j + I``.
        interleaved: feature ``j`` is in the rows ``copies j`` to ``copies j + copies - 1`` instead.
    """
    copies_C = torch.arange(copies, device=order_I.device)
    if interleaved:
        return (copies * order_I[:width, None] + copies_C).flatten()
    return (len(order_I) * copies_C[:, None] + order_I[:width]).flatten()


def _root(gram_II: Tensor, order_N: Tensor, *, overwrite: bool = False) -> Tensor:
    """The Cholesky factor, float64, of the Gram of some features with a ridge.

    The ridge is larger where rounding has left no positive matrix. Nothing else of the Gram's size is in memory.

    Args:
        overwrite: takes the memory of the Gram, for an ascending order. Only the least ridge is tried then.

    Raises:
        torch.linalg.LinAlgError: the Gram is not positive semi-definite.
    """
    mean = gram_II.diagonal()[order_N].double().mean().clamp_min(torch.finfo(torch.float64).tiny)
    for ridge in RIDGES[: 1 if overwrite else None]:
        ridged_NN = _taken(gram_II, order_N, overwrite=overwrite)
        ridged_NN.diagonal().add_(ridge * mean)
        root_NN, found = cholesky_in_place(ridged_NN)
        if found:
            return root_NN
    raise torch.linalg.LinAlgError("the Gram of the inner features is not positive semi-definite")  # pyright: ignore[reportPrivateImportUsage]


def _taken(matrix_NN: Tensor, kept_K: Tensor, *, overwrite: bool) -> Tensor:
    """Some rows and the same columns of a matrix, float64.

    Args:
        overwrite: takes the memory of a contiguous matrix, for ascending rows: each moves to where no later row is.
    """
    size = len(kept_K)
    if overwrite:
        taken_KK = matrix_NN.reshape(-1)[: size * size].view(size, size)
    else:
        taken_KK = matrix_NN.new_empty(size, size, dtype=torch.float64)
    for rows_RK, kept_R in zip(taken_KK.split(ROWS), kept_K.split(ROWS), strict=True):
        rows_RK.copy_(matrix_NN[kept_R][:, kept_K])
    return taken_KK


def _in_left_metric(weight_OI: Tensor, left_gram_OO: Tensor | None) -> Tensor:
    """``L W``: its columns have the length that those of ``W`` have in the left metric."""
    return weight_OI if left_gram_OO is None else torch.linalg.cholesky(left_gram_OO.double()).mT @ weight_OI
