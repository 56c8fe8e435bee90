"""Stops at the first NaN or infinity."""

from __future__ import annotations

import torch
from torch import Tensor

from svdllm.common.errors import NumericalError


def require_finite(tensor: Tensor, what: str) -> Tensor:
    """Returns the tensor. Raises NumericalError if a value is NaN or infinite; ``what`` begins the message."""
    if not bool(torch.isfinite(tensor).all()):
        raise NumericalError(
            f"{what} has NaN or infinite values. If the model computes in float16, try --dtype float32."
        )
    return tensor
