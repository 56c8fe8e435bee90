"""PB-LLM (arXiv 2310.00034) without training: salient weights in 8 bits, all others binary, errors fed back."""

from __future__ import annotations

import torch
from torch import Tensor

from svdllm.compression.math.few_bits.feedback import quantise_blocks
from svdllm.compression.math.few_bits.quantised import SCALE_BITS, Quantised
from svdllm.compression.math.rounding import DAMPING, feedback_factor

SALIENT_SHARE = 0.1  # of the weights of a matrix
SALIENT_BITS = 8
SCALES_OF_ROW = 4  # mean and distance of the binary weights, least value and step of the salient ones


def pb_llm_bits(rows: int, columns: int) -> float:
    """Bits of a matrix by the paper's formula, which leaves out the mask and the scales."""
    salient = num_salient(rows * columns)
    return SALIENT_BITS * salient + (rows * columns - salient)


def num_salient(weights: int) -> int:
    return round(SALIENT_SHARE * weights)


def pb_llm(weight_OI: Tensor, gram_II: Tensor) -> Quantised:
    """Quantises a matrix in the metric of its inputs.

    A weight is salient by ``w^2 / U_jj^2``, for the upper Cholesky factor ``U`` of the inverse Gram: the loss of
    removing it, if the columns after it make up for that. Grids are made from the weights as they are at first.
    """
    factor_II = feedback_factor(gram_II, DAMPING).to(weight_OI)
    salience_OI = (weight_OI / factor_II.diagonal()).square()
    salient = num_salient(weight_OI.numel())
    mask_OI = torch.zeros(weight_OI.numel(), dtype=torch.bool, device=weight_OI.device)
    mask_OI[salience_OI.flatten().topk(salient).indices] = True
    mask_OI = mask_OI.view_as(weight_OI)
    others_OI = weight_OI * ~mask_OI  # salient ones count as zeros
    mean_O1 = others_OI.mean(1, keepdim=True)
    distance_O1 = (others_OI - mean_O1).abs().mean(1, keepdim=True)
    least_O1, most_O1 = weight_OI.aminmax(dim=1, keepdim=True)
    step_O1 = ((most_O1 - least_O1) / (2**SALIENT_BITS - 1)).clamp_min(torch.finfo(weight_OI.dtype).tiny)

    def quantise(columns_OB: Tensor, block: slice) -> Tensor:
        codes_OB = ((columns_OB - least_O1) / step_O1).round().clamp(0, 2**SALIENT_BITS - 1)
        binary_OB = mean_O1 + torch.where(columns_OB < mean_O1, -distance_O1, distance_O1)
        return torch.where(mask_OI[:, block], least_O1 + codes_OB * step_O1, binary_OB)

    quantised_OI = quantise_blocks(weight_OI, factor_II, 1, quantise)
    bits = pb_llm_bits(*weight_OI.shape)
    stored_bits = bits + weight_OI.numel() + len(weight_OI) * SCALES_OF_ROW * SCALE_BITS
    return Quantised(quantised_OI, bits, stored_bits)
