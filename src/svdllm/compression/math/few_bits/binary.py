"""Binarises the weights of a mask: each row of it has a mean and one distance from it (XNOR-Net, arXiv 1603.05279)."""

from __future__ import annotations

import torch
from torch import Tensor


def binarised(values_OI: Tensor, mask_OI: Tensor) -> Tensor:
    """``mean + distance * sign`` of every row of a mask; zero outside it.

    The mean and the mean distance from it are those over the mask.
    """
    mask_OI = mask_OI.to(values_OI)
    count_O1 = mask_OI.sum(1, keepdim=True).clamp_min(1)
    mean_O1 = (values_OI * mask_OI).sum(1, keepdim=True) / count_O1
    centred_OI = values_OI - mean_O1
    distance_O1 = (centred_OI.abs() * mask_OI).sum(1, keepdim=True) / count_O1
    return (mean_O1 + torch.where(centred_OI < 0, -distance_O1, distance_O1)) * mask_OI


def binarised_twice(values_OI: Tensor, mask_OI: Tensor) -> Tensor:
    """Binarises the weights of a mask, and then what is left of them."""
    first_OI = binarised(values_OI, mask_OI)
    return first_OI + binarised(values_OI - first_OI, mask_OI)
