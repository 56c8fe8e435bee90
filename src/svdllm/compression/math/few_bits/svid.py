"""OneBit's start (arXiv 2402.11295): sign-value-independent decomposition, ``W ~ sign(W) * (w h^T)``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from svdllm.compression.math.few_bits.quantised import SCALE_BITS

STEPS = 50  # of the power iteration; the first singular value of magnitudes is far above the second


class ValueVectors(NamedTuple):
    """The vectors ``w`` and ``h`` of the magnitudes, in equal shares."""

    rows_O: Tensor
    columns_I: Tensor


def value_vectors(weight_OI: Tensor) -> ValueVectors:
    """The best ``w h^T`` of rank 1 for the magnitudes of a matrix: its first singular vectors, which have no signs."""
    magnitudes_OI = weight_OI.abs().double()
    columns_I = magnitudes_OI.mean(0)
    for _ in range(STEPS):
        rows_O = magnitudes_OI @ columns_I
        rows_O = rows_O / rows_O.norm().clamp_min(torch.finfo(torch.float64).tiny)
        columns_I = rows_O @ magnitudes_OI
        length = columns_I.norm().clamp_min(torch.finfo(torch.float64).tiny)
        columns_I = columns_I / length
    share = length.sqrt()
    return ValueVectors((rows_O * share).to(weight_OI), (columns_I * share).to(weight_OI))


def one_bit_bits(rows: int, columns: int) -> float:
    """Bits of a matrix by the paper's formula: a sign for each weight, and the value vectors in 16 bits."""
    return rows * columns + SCALE_BITS * (rows + columns)
