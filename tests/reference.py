"""Independent oracles for the tests: the paper's own path and brute force, in float64, sharing no code with svdllm."""

from __future__ import annotations

import torch
from torch import Tensor


def paper_product(weight_OI: Tensor, inputs_IT: Tensor, rank: int) -> Tensor:
    """``W'`` by SVD-LLM's Algorithm 1 as printed: Cholesky, SVD of ``W S``, truncation, explicit inverse of ``S``."""
    root_II = torch.linalg.cholesky(inputs_IT @ inputs_IT.T)
    left, sigma, right = torch.linalg.svd(weight_OI @ root_II, full_matrices=False)
    u_OR = left[:, :rank] * sigma[:rank].sqrt()
    v_RI = sigma[:rank].sqrt()[:, None] * right[:rank] @ torch.linalg.inv(root_II)
    return u_OR @ v_RI


def optimal_outputs(weight_OI: Tensor, inputs_IT: Tensor, rank: int) -> Tensor:
    """The best rank-``rank`` approximation of ``W X`` (Eckart and Young); any input, singular or not."""
    left, sigma, right = torch.linalg.svd(weight_OI @ inputs_IT, full_matrices=False)
    return (left[:, :rank] * sigma[:rank]) @ right[:rank]


def optimal_product(weight_OI: Tensor, inputs_IT: Tensor, rank: int) -> Tensor:
    """A ``W'`` of rank ``rank`` whose outputs are optimal: ``[W X]_r X^+``."""
    return optimal_outputs(weight_OI, inputs_IT, rank) @ torch.linalg.pinv(inputs_IT)


def scaled_product(weight_OI: Tensor, scale_I: Tensor, rank: int) -> Tensor:
    """``SVD_r(W diag(s)) diag(s)^-1``: ASVD, and plain SVD for ``s = 1``."""
    left, sigma, right = torch.linalg.svd(weight_OI @ torch.diag(scale_I), full_matrices=False)
    return (left[:, :rank] * sigma[:rank]) @ right[:rank] @ torch.linalg.inv(torch.diag(scale_I))


def measured_loss(weight_OI: Tensor, product_OI: Tensor, inputs_IT: Tensor) -> Tensor:
    """``||(W - W') X||_F^2`` from its definition."""
    return (((weight_OI - product_OI) @ inputs_IT) ** 2).sum()
