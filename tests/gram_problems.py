"""Matrices with Grams of correlated inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def problem(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A random weight (``rows x columns``) and the Gram of random inputs that are correlated."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=dtype)
    inputs = torch.randn(4 * columns, columns, generator=generator, dtype=dtype) @ mixing
    return torch.randn(rows, columns, generator=generator, dtype=dtype), inputs.mT @ inputs


def loss(weight: Tensor, quantised: Tensor, gram: Tensor) -> float:
    """The squared error in the metric of the inputs."""
    error = weight - quantised
    return float(torch.trace(error @ gram @ error.mT))


def damped(gram: Tensor) -> Tensor:
    """The Gram with a hundredth of its mean diagonal added, as GPTQ has it."""
    return gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
