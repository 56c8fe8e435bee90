"""Reads what caches and fused linears need of a pair or a packed linear, beside its forward.

The linears may be of classes in a checkpoint's own copy of ``lowrank.py``, so they are told apart by their attributes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_packed(linear: Any, side: str) -> bool:
    """Whether a linear is packed by ``rows`` or by ``columns``."""
    return getattr(linear, "side", None) == side


def is_factored(linear: Any) -> bool:
    """Whether a linear is a pair or packed."""
    return hasattr(linear, "svd_v") and hasattr(linear, "svd_u")


def rank_of(linear: Any) -> int:
    return linear.svd_v.out_features


def out_features_of(linear: Any) -> int:
    return len(linear.order) if is_packed(linear, "rows") else linear.svd_u.out_features


def bias_of(linear: Any) -> Tensor | None:
    return linear.bias if hasattr(linear, "order") else linear.svd_u.bias


def latent_of(linear: Any, x: Tensor) -> Tensor:
    """The latent (..., rank): ``V x``, or of a packed linear the outputs of its pivot rows or pivot columns."""
    if not is_packed(linear, "columns"):
        return linear.svd_v(x)
    pivots, others = x[..., linear.order].tensor_split([rank_of(linear)], dim=-1)
    return pivots + linear.svd_v(others)


def output_of(linear: Any, latent: Tensor) -> Tensor:
    """The output (..., out) of the linear from its latent."""
    output = linear.svd_u(latent)
    if is_packed(linear, "rows"):
        output = torch.cat((latent, output), dim=-1)[..., linear.order]
    bias = bias_of(linear) if hasattr(linear, "order") else None
    return output if bias is None else output + bias


def expanded_u(linear: Any) -> Tensor:
    """``U`` (out, rank), by which the output without bias is ``U`` times the latent.

    Of a linear packed by rows, which has this without the rows of the pivots, it is a new tensor.
    """
    weight = linear.svd_u.weight
    if not is_packed(linear, "rows"):
        return weight
    identity = torch.eye(rank_of(linear), dtype=weight.dtype, device=weight.device)
    return torch.cat((identity, weight.detach())).index_select(0, linear.order)
