"""QuIP# (arXiv 2402.04396) without fine-tuning: rotated matrices, the codebook E8P, errors fed back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from svdllm.compression.math.few_bits.e8p import CODE_BITS, ROOT_MEAN_SQUARE, WIDTH, nearest_points
from svdllm.compression.math.few_bits.feedback import quantise_blocks
from svdllm.compression.math.few_bits.incoherence import Rotation, random_rotation
from svdllm.compression.math.few_bits.quantised import SCALE_BITS, Quantised
from svdllm.compression.math.rounding import DAMPING, feedback_factor


def quip_bits(rows: int, columns: int) -> float:
    """Bits of a matrix by the paper's formula: two a weight, in whole codes; signs and the scale are left out."""
    return rows * -(-columns // WIDTH) * CODE_BITS


def quip(weight_OI: Tensor, gram_II: Tensor, generator: torch.Generator) -> Quantised:
    """Quantises a matrix in the metric of its inputs, rotated on both sides."""
    rows, columns = weight_OI.shape
    outputs, inputs = (_placed(random_rotation(size, generator), weight_OI) for size in (rows, columns))
    rotated_OI = outputs.apply(inputs.apply(weight_OI).mT).mT
    gram_inputs = _placed(inputs, gram_II)
    factor_II = feedback_factor(gram_inputs.apply(gram_inputs.apply(gram_II).mT), DAMPING)
    scale = float(rotated_OI.square().mean().sqrt()) / ROOT_MEAN_SQUARE or 1.0

    def quantise(columns_OB: Tensor, block: slice) -> Tensor:
        width = columns_OB.shape[1]
        return nearest_points(F.pad(columns_OB, (0, WIDTH - width)) / scale)[:, :width] * scale

    quantised_OI = quantise_blocks(rotated_OI, factor_II, WIDTH, quantise)
    bits = quip_bits(rows, columns)
    weight_OI = inputs.undo(outputs.undo(quantised_OI.mT).mT)
    return Quantised(weight_OI, bits, bits + rows + columns + SCALE_BITS)


def _placed(rotation: Rotation, like: Tensor) -> Rotation:
    return Rotation(rotation.signs_N.to(like), rotation.core_MM.to(like))
