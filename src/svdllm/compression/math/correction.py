"""Low rank of what rounding leaves over: ``W = Q + U V`` with ``Q`` in few bits.

``U V`` is the best of its rank for ``W - Q`` in the metrics of inputs and outputs, and ``Q`` is rounded again from
``W - U V``, in turns. Sources: LQER, EoRA and QERA for the correction, LoftQ for the turns.

Shape suffixes as in ``rounding`` and ``linalg``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from svdllm.compression.math.linalg import factorise, output_spectrum
from svdllm.compression.math.rounding import Rounded

TURNS = 3


class Corrected(NamedTuple):
    """A matrix in few bits with a low-rank correction."""

    rounded: Rounded
    u_OR: Tensor  # float64
    v_RI: Tensor


def squared_error(error_OI: Tensor, gram: Tensor | None, left_OO: Tensor | None) -> float:
    """``||L E S||_F^2`` for the metrics ``S S^T`` of the inputs and ``L^T L`` of the outputs."""
    error_OI = error_OI.double()
    weighted_OI = error_OI
    if gram is not None:
        weighted_OI = error_OI * gram.double() if gram.ndim == 1 else error_OI @ gram.double()
    left_OI = error_OI if left_OO is None else left_OO.double() @ error_OI
    return float((weighted_OI * left_OI).sum())


def corrected(
    weight_OI: Tensor,
    gram: Tensor | None,
    left_OO: Tensor | None,
    rank: int,
    round_: Callable[[Tensor], Rounded],
    turns: int = TURNS,
) -> Corrected:
    """Rounds a matrix and corrects it, in turns; the turn of the least error counts.

    Args:
        round_: rounds a matrix of this shape.

    Raises:
        torch.linalg.LinAlgError: a metric is not finite or not positive definite.
    """
    best: Corrected | None = None
    least = float("inf")
    product_OI = torch.zeros_like(weight_OI)
    for _ in range(turns):
        rounded = round_(weight_OI - product_OI)
        rest_OI = weight_OI.double() - rounded.matrix.double()
        u_OR, v_RI = factorise(rest_OI, output_spectrum(rest_OI, gram, rank, left=left_OO), rank)
        error = squared_error(rest_OI - u_OR @ v_RI, gram, left_OO)
        if error < least:
            best, least = Corrected(rounded, u_OR, v_RI), error
        product_OI = (u_OR @ v_RI).to(weight_OI.dtype)
    assert best is not None
    return best
