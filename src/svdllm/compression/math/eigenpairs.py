"""Leading eigenpairs of ``W C W^T``, in float32 as far as it resolves them.

``eigh`` in float32 takes half the time of float64, and products a third to a half. Its error is about 1e-7 of the
largest eigenvalue, and the largest energies of a linear are often 1e4 times those at which it is truncated. What is
large is therefore taken out first, in float64:

- of the product, the channels of largest energy (a partial Cholesky factor of ``C``); random vectors then measure the
  error of the rest;
- of the eigenproblem, the leading directions, found by subspace iteration. Their energies are lowered to a common
  level. After ``eigh`` the leading directions are rotated once more, by a float64 ``eigh`` of their own block.

Where float32 still does not suffice, float64 does all. Shape suffixes: ``N`` size of the product, ``I`` in_features,
``K`` leading directions, ``C`` leading channels, ``P`` probes, ``D`` depth.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from svdllm.compression.math.symmetric import ROWS, congruence, symmetric_product

# Smaller matrices take a fraction of a second in float64.
LEAST_SIZE = 1024
# Shares of the channels and directions that are taken out, and the size of the subspace over the number of directions.
CHANNELS, DIRECTIONS, OVERSAMPLING = 1 / 64, 1 / 16, 1.5
ITERATIONS = 2
LEAST_CHANNELS = 64
# Share of the directions that are rotated in float64 after eigh.
ROTATED = 3 / 16
# Least energy, over the common level, that float32 resolves, and the share of all energy that need not be resolved.
RESOLVED, NEGLIGIBLE = 2**-8, 1e-4
# Least common level, over the largest energy, above what float64 rounds away.
LEAST_LEVEL = 1e-10
# Largest error of a product (Frobenius), over the common level and the square root of its size.
TOLERATED = 2e-6
# Energies up to this multiple of the common level stay: the subspace iteration has not found their directions exactly.
LOWERED = 2
PROBES = 8


class Eigenpairs(NamedTuple):
    """Eigenvalues in descending order, and the eigenvectors of the first of them."""

    energies_N: Tensor  # float64, not negative
    basis_ND: Tensor


def eigenpairs(weight_NI: Tensor, gram: Tensor | None, depth: int, dtype: torch.dtype) -> Eigenpairs:
    """Computes the eigenvalues of ``W C W^T`` and the leading eigenvectors.

    Args:
        gram: ``C`` as ``None`` (identity), ``(I,)`` (diagonal) or ``(I, I)``.
        depth: how many eigenvectors to return. None are computed for 0.
        dtype: of the eigenvectors. With float32, large matrices are decomposed in float32 where the loss of a
            truncation at any rank is above the optimum by less than 1e-6 of it, or 1e-9 of the whole energy.

    Raises:
        torch.linalg.LinAlgError: the iteration does not converge (non-finite input).
    """
    if dtype == torch.float32 and depth and len(weight_NI) >= LEAST_SIZE:
        found = _in_float32(weight_NI, gram, depth)
        if found is not None:
            return found
    matrix_NN = congruence(weight_NI, gram)
    if not depth:
        energies_N = torch.linalg.eigvalsh(matrix_NN)
        return Eigenpairs(energies_N.flip(0).clamp_min(0), matrix_NN.new_zeros(len(matrix_NN), 0))
    energies_N, basis_NN = torch.linalg.eigh(matrix_NN)
    return Eigenpairs(energies_N.flip(0).clamp_min(0), basis_NN.flip(1)[:, :depth].to(dtype))


def _in_float32(weight_NI: Tensor, gram: Tensor | None, depth: int) -> Eigenpairs | None:
    """Eigenpairs by a float32 ``eigh``; None where it does not resolve them."""
    matrix_NN, error = _fast_congruence(weight_NI, gram)
    leading_K, directions_NK = _leading_pairs(matrix_NN)
    if not error <= TOLERATED * len(matrix_NN) ** 0.5 * float(leading_K[-1]):
        matrix_NN = congruence(weight_NI, gram)
        leading_K, directions_NK = _leading_pairs(matrix_NN)
    level = leading_K[-1]
    if not bool(level > LEAST_LEVEL * leading_K[0]):
        return None
    kept_K = leading_K.clamp_max(LOWERED * level)
    excess_K = leading_K - kept_K * (1 + (leading_K / kept_K).log())
    lowered_NN = torch.addmm(matrix_NN, directions_NK * excess_K, directions_NK.mT, alpha=-1).div_(level)
    values_N, vectors_NN = torch.linalg.eigh(lowered_NN.float())
    energies_N, basis_ND = values_N.flip(0).double() * level, vectors_NN.flip(1)[:, :depth]
    energies_N[:depth] += excess_K @ (directions_NK.float().mT @ basis_ND).double().square()
    rotated = min(int(ROTATED * len(matrix_NN)), depth)
    pairs = _within(matrix_NN, basis_ND[:, :rotated].double())
    energies_N[:rotated], basis_ND[:, :rotated] = pairs.energies_N, pairs.basis_ND.float()
    energies_N = energies_N.clamp_min(0)
    unresolved = energies_N[:depth] < RESOLVED * level
    if float(energies_N[:depth][unresolved].sum()) > NEGLIGIBLE * float(energies_N.sum()):
        return None
    return Eigenpairs(energies_N.sort(descending=True).values, basis_ND)


def _fast_congruence(weight_NI: Tensor, gram: Tensor | None) -> tuple[Tensor, float]:
    """``W C W^T``, float64, with products in float32 if ``C`` is a matrix; and its estimated error (Frobenius)."""
    if gram is None or gram.ndim == 1:
        return congruence(weight_NI, gram), 0.0
    weight_NI, single_NI = weight_NI.double(), weight_NI.float()
    channels_C = gram.diagonal().topk(max(LEAST_CHANNELS, int(CHANNELS * len(gram)))).indices
    rows_CI = gram[channels_C].double()
    factor_CC, info = torch.linalg.cholesky_ex(rows_CI[:, channels_C])
    if info.item():
        return congruence(weight_NI, gram), 0.0
    root_CI = torch.linalg.solve_triangular(factor_CC, rows_CI, upper=False)
    weighted_NI = torch.zeros_like(single_NI)
    for start in range(0, len(gram), ROWS):
        rows = slice(start, start + ROWS)
        rest = torch.addmm(gram[rows].double(), root_CI[:, rows].mT, root_CI, alpha=-1)
        weighted_NI.addmm_(single_NI[:, rows], rest.float())
    outputs_NC = weight_NI @ root_CI.mT
    matrix_NN = symmetric_product(weighted_NI, single_NI.mT).double().addmm_(outputs_NC, outputs_NC.mT)
    return matrix_NN, _error(matrix_NN, weight_NI, gram)


def _error(matrix_NN: Tensor, weight_NI: Tensor, gram_II: Tensor) -> float:
    """Estimates ``||A - W C W^T||_F`` by products with random vectors, in float64."""
    generator = torch.Generator().manual_seed(0)
    probes_NP = torch.randn(len(matrix_NN), PROBES, dtype=torch.float64, generator=generator).to(matrix_NN.device)
    inputs_IP = weight_NI.mT @ probes_NP
    weighted_IP = torch.cat([rows_RI.double() @ inputs_IP for rows_RI in gram_II.split(ROWS)])
    error_NP = matrix_NN @ probes_NP - weight_NI @ weighted_IP
    return float(error_NP.norm()) / PROBES**0.5


def _leading_pairs(matrix_NN: Tensor) -> Eigenpairs:
    """The leading Ritz pairs, by subspace iteration from the columns of largest diagonal."""
    size = int(DIRECTIONS * len(matrix_NN))
    start = matrix_NN.diagonal().topk(int(OVERSAMPLING * size)).indices
    basis_NM = torch.linalg.qr(matrix_NN[:, start]).Q
    for _ in range(ITERATIONS):
        basis_NM = torch.linalg.qr(matrix_NN @ basis_NM).Q
    energies_M, basis_NM = _within(matrix_NN, basis_NM)
    return Eigenpairs(energies_M[:size], basis_NM[:, :size])


def _within(matrix_NN: Tensor, vectors_NM: Tensor) -> Eigenpairs:
    """Ritz pairs of a matrix: its eigenpairs within the span of some almost orthonormal vectors."""
    factor_MM = torch.linalg.cholesky(vectors_NM.mT @ vectors_NM)
    vectors_NM = torch.linalg.solve_triangular(factor_MM, vectors_NM.mT, upper=False).mT
    energies_M, rotation_MM = torch.linalg.eigh(vectors_NM.mT @ (matrix_NN @ vectors_NM))
    return Eigenpairs(energies_M.flip(0), vectors_NM @ rotation_MM.flip(1))
