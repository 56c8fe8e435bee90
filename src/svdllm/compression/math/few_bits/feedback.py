"""Quantises columns block by block; what a block loses is made up by the columns after it.

Shape suffixes: ``O`` out_features (rows), ``I`` in_features, ``B`` columns of a block.

With the upper Cholesky factor ``U`` of the inverse of the Gram, the columns after a block ``B`` make up best for its
error ``E`` by ``-E U_BB^-1 U_B,rest``. Blocks of one column are GPTQ (arXiv 2210.17323), larger ones the block LDLQ of
QuIP# (arXiv 2402.04396), from the other end. Few bits as forms have a loop of their own for single columns, in
``math/rounding.py``: it rounds every linear of a model in six numbers of bits, so its columns lie in one piece of
memory and no system is solved for each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from svdllm.compression.math.rounding import PANEL

# Columns (``O x B``) as they are by now, and their places -> the values that take their place.
QuantiseBlock = Callable[[Tensor, slice], Tensor]


def quantise_blocks(
    weight_OI: Tensor, factor_II: Tensor, width: int, quantise: QuantiseBlock, *, within_blocks: bool = True
) -> Tensor:
    """The quantised matrix (``O x I``).

    Args:
        factor_II: the upper Cholesky factor of the inverse of the Gram of the inputs.
        width: columns of a block, a divisor of ``PANEL``; the last block may be narrower.
        within_blocks: whether errors are handed on as all columns of a block together make them. Without, each column's
            own error is handed on, as BiLLM does.
    """
    left_OI, quantised_OI = weight_OI.clone(), torch.empty_like(weight_OI)
    factor_II, size = factor_II.to(weight_OI), weight_OI.shape[1]
    for first in range(0, size, PANEL):
        last = min(first + PANEL, size)
        errors_OP = torch.empty_like(left_OI[:, first:last])
        for start in range(first, last, width):
            block = slice(start, min(start + width, last))
            quantised_OI[:, block] = quantise(left_OI[:, block], block)
            error_OB, factor_BB = left_OI[:, block] - quantised_OI[:, block], factor_II[block, block]
            if within_blocks:
                error_OB = torch.linalg.solve_triangular(factor_BB, error_OB, upper=True, left=False)
            else:
                error_OB = error_OB / factor_BB.diagonal()
            errors_OP[:, start - first : block.stop - first] = error_OB
            left_OI[:, block.stop : last] -= error_OB @ factor_II[block, block.stop : last]
        left_OI[:, last:] -= errors_OP @ factor_II[first:last, last:]
    return quantised_OI
