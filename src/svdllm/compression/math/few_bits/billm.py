"""BiLLM (arXiv 2402.04291): salient columns binarised twice, the others in two groups by their magnitude.

Columns are quantised in blocks. Errors are handed on between blocks only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdllm.compression.math.few_bits.binary import binarised, binarised_twice
from svdllm.compression.math.few_bits.feedback import quantise_blocks
from svdllm.compression.math.few_bits.quantised import SCALE_BITS, Quantised
from svdllm.compression.math.rounding import DAMPING, feedback_factor

BLOCK = 128
MOST_SALIENT = 49  # columns of a block
THRESHOLDS = torch.linspace(0.1, 0.9, 81)  # quantiles of the magnitudes of the columns that are not salient
SCALES_OF_ROW = 8  # in every block: mean and distance, of the salient columns twice, and of the two groups
USUAL_BITS = 1.1  # a weight, in the paper


def billm_bits(rows: int, columns: int, salient_columns: int) -> float:
    """Bits of a matrix by the paper's formula ``2 r + (1 - r)`` a weight, without bitmaps and scales.

    ``r`` is the share of the salient columns.
    """
    return rows * (columns + salient_columns)


def billm(weight_OI: Tensor, gram_II: Tensor) -> Quantised:
    """Quantises a matrix in the metric of its inputs.

    The groups are looked for on the salience ``w^2 / U_jj^2``, as in the authors' code, and binarised on the weights.
    """
    factor_II = feedback_factor(gram_II, DAMPING).to(weight_OI)
    salient_columns = 0

    def quantise(columns_OB: Tensor, block: slice) -> Tensor:
        nonlocal salient_columns
        salience_OB = (columns_OB / factor_II.diagonal()[block]).square()
        salient_B = salient_of(salience_OB)
        salient_columns += int(salient_B.sum())
        return binarised_in_groups(columns_OB, salient_B, large_of(salience_OB, salient_B))

    quantised_OI = quantise_blocks(weight_OI, factor_II, BLOCK, quantise, within_blocks=False)
    rows, columns = weight_OI.shape
    bits = billm_bits(rows, columns, salient_columns)
    scales = rows * -(-columns // BLOCK) * SCALES_OF_ROW * SCALE_BITS
    return Quantised(quantised_OI, bits, bits + rows * columns + columns + scales)


def salient_of(salience_OB: Tensor) -> Tensor:
    """The salient columns of a block (mask, ``B``): as many as give the least error of binarising twice.

    They are the columns of the largest sums. For the choice, the others are binarised twice as well.
    """
    ranked_B = salience_OB.abs().sum(0).argsort(descending=True, stable=True)
    best_B, least = torch.zeros_like(ranked_B, dtype=torch.bool), torch.inf
    for count in range(1, min(MOST_SALIENT, len(ranked_B) - 1) + 1):
        salient_B = torch.zeros_like(best_B)
        salient_B[ranked_B[:count]] = True
        mask_OB = salient_B.expand_as(salience_OB)
        found_OB = binarised_twice(salience_OB, mask_OB) + binarised_twice(salience_OB, ~mask_OB)
        if (error := float((salience_OB - found_OB).square().sum())) < least:
            best_B, least = salient_B, error
    return best_B


def large_of(salience_OB: Tensor, salient_B: Tensor) -> Tensor:
    """Which of the other columns' weights are of the group of large ones (mask, ``O x B``).

    The threshold is the one whose groups, each binarised, have the least error.
    """
    magnitudes_OB, others_OB = salience_OB.abs(), (~salient_B).expand_as(salience_OB)
    sorted_N = magnitudes_OB[others_OB].sort().values
    best_OB, least = torch.zeros_like(others_OB), torch.inf
    for place in (THRESHOLDS * (len(sorted_N) - 1)).round().long().tolist():
        large_OB = others_OB & (magnitudes_OB > sorted_N[place])
        found_OB = binarised(salience_OB, large_OB) + binarised(salience_OB, others_OB & ~large_OB)
        if (error := float(((salience_OB - found_OB) * others_OB).square().sum())) < least:
            best_OB, least = large_OB, error
    return best_OB


def binarised_in_groups(columns_OB: Tensor, salient_B: Tensor, large_OB: Tensor) -> Tensor:
    """Salient columns binarised twice; large and small weights of the others once, each with their own scales."""
    salient_OB = salient_B.expand_as(columns_OB)
    small_OB = ~salient_OB & ~large_OB
    return binarised_twice(columns_OB, salient_OB) + binarised(columns_OB, large_OB) + binarised(columns_OB, small_OB)
