"""GPTQ (arXiv 2210.17323) as a system of the tables: a number of bits, and a scale for each group of inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from svdllm.compression.math.few_bits.quantised import SCALE_BITS, Quantised
from svdllm.compression.math.rounding import Rounded, round_rows

GROUP_SIZES = (128, 64, 32)


def default_group(columns: int) -> int:
    """The largest of ``GROUP_SIZES`` that divides the inputs, or else the whole row."""
    return next((size for size in GROUP_SIZES if columns % size == 0), columns)


def gptq_bits(rows: int, columns: int, bits: int, group_size: int | None = None) -> float:
    """Bits of a matrix: its codes and the scales."""
    groups = columns // (group_size or default_group(columns))
    return rows * (columns * bits + groups * SCALE_BITS)


def gptq(weight_OI: Tensor, gram_II: Tensor, bits: int, group_size: int | None = None) -> Quantised:
    """Rounds a matrix in the metric of its inputs; ``group_size`` divides ``in_features``."""
    rows, columns = weight_OI.shape
    half_O = torch.full((rows,), 2.0 ** (bits - 1), device=weight_OI.device)
    codes_OI, scales_OG = round_rows(weight_OI, gram_II, half_O, group_size or default_group(columns), torch.float16)
    found = gptq_bits(rows, columns, bits, group_size)
    return Quantised(Rounded(codes_OI, scales_OG.to(weight_OI)).matrix, found, found)
