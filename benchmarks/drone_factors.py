"""DRONE (Chen et al., NeurIPS 2021) as SVD-LLM describes it (arXiv 2403.07378, appendix A.5), for small problems.

It solves the problem of ``svdllm.compression.math.linalg``, ``min ||(W - W') X||_F`` over a rank, but keeps all
inputs ``X``, where SVD-LLM keeps their Gram. With ``W = U_W S_W V_W^T`` and ``X^T = U_X S_X V_X^T`` the optimum is
``W' = W M`` for ``M = V_W S_W^-1 Z_r S_X^-1 V_X^T``, ``Z_r`` being the truncated SVD of ``Z = S_W V_W^T V_X S_X``.

Shape suffixes: ``O`` out_features, ``I`` in_features, ``T`` tokens, ``K`` rank of the weight, ``L`` rank of the inputs,
``N = min(K, L)``, ``R`` rank of the factors.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from svdllm.common.errors import InputError, ResourceError

MEMORY = 4 * 2**30


def drone_factors(
    weight_OI: Tensor, batches: Iterable[Tensor], rank: int, *, memory: int = MEMORY
) -> tuple[Tensor, Tensor]:
    """``u`` (``O x R``) and ``v`` (``R x I``) of the optimal ``W' = u v``, float64.

    ``R`` is ``rank``, or the rank of the weight or of the inputs where that is less.

    Args:
        weight_OI: the weight, any float dtype; computed in float64.
        batches: the inputs (``... x in`` each), any float dtype; all are kept in float64.
        rank: at least 1.
        memory: bytes that the inputs and their SVD may take; 4 GiB by default.

    Raises:
        InputError: the rank is below 1, there are no inputs, or their features are not the weight's.
        ResourceError: the inputs are too many; before they are kept, and before any decomposition.
        torch.linalg.LinAlgError: a decomposition does not converge (non-finite input).
    """
    if rank < 1:
        raise InputError(f"rank must be at least 1, found {rank}.")
    inputs_TI = _kept(batches, weight_OI.shape[1], memory)
    left_OK, weight_sigma_K, weight_right_KI = _compact_svd(weight_OI.double())
    _, input_sigma_L, input_right_LI = _compact_svd(inputs_TI)
    core_KL = weight_sigma_K[:, None] * (weight_right_KI @ input_right_LI.mT) * input_sigma_L
    core_left_KN, sigma_N, core_right_NL = torch.linalg.svd(core_KL, full_matrices=False)
    half_R = sigma_N[:rank].sqrt()
    u_OR = left_OK @ (core_left_KN[:, :rank] * half_R)  # W V_W S_W^-1 is U_W
    v_RI = (half_R[:, None] * core_right_NL[:rank] / input_sigma_L) @ input_right_LI
    return u_OR, v_RI


def drone_bytes(num_tokens: int, in_features: int) -> int:
    """About what the inputs and their SVD take, float64: both, the singular vectors, and LAPACK's workspace."""
    smaller = min(num_tokens, in_features)
    return 8 * (2 * num_tokens * in_features + smaller * (num_tokens + in_features) + 8 * smaller**2)


def _kept(batches: Iterable[Tensor], in_features: int, memory: int) -> Tensor:
    """All inputs as one matrix (``T x I``)."""
    kept: list[Tensor] = []
    num_tokens = 0
    for batch in batches:
        if batch.shape[-1] != in_features:
            raise InputError(f"The inputs have {batch.shape[-1]} features, the weight takes {in_features}.")
        tokens_TI = batch.reshape(-1, in_features)
        num_tokens += len(tokens_TI)
        if (needed := drone_bytes(num_tokens, in_features)) > memory:
            raise ResourceError(
                f"DRONE keeps all inputs: {num_tokens:,} tokens or more of {in_features:,} features take "
                f"{needed / 1e9:.1f} GB with their SVD, {memory / 1e9:.1f} GB are allowed. Give fewer tokens or more "
                "memory=, or use svdllm.compression.math.linalg, which needs their Gram only."
            )
        kept.append(tokens_TI.double())
    if not num_tokens:
        raise InputError("There are no inputs: give at least one token.")
    return torch.cat(kept)


def _compact_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Without the null spaces, by the tolerance of ``torch.linalg.matrix_rank``."""
    left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((sigma > sigma[0] * max(matrix.shape) * torch.finfo(matrix.dtype).eps).sum())
    return left[:, :rank], sigma[:rank], right[:rank]
