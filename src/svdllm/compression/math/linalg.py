"""Spectra and truncation: tensors in, tensors out.

Shape suffixes: ``O`` out_features, ``I`` in_features, ``K = min(O, I)``, ``D`` depth of a stored basis, ``R`` rank.

Every method is ``min ||L (W - W') S||_F`` over a rank. The right metric ``C = S S^T`` comes from the inputs of a target
and has three forms: ``None`` (identity), ``(I,)`` (diagonal) or ``(I, I)``. The left metric ``G = L^T L`` comes from
the gradients of its outputs and is ``None``, ``(O, O)`` or a ``Pullback``. SVD-LLM (arXiv 2403.07378, section 3.1)
whitens with the Cholesky factor of ``C`` and takes an SVD. The projection of ``W`` on the leading eigenvectors of ``W C
W^T`` is the same optimum; it needs no inverse and is defined for a singular ``C``. With a left metric, ``L W`` takes
the place of ``W``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from svdllm.compression.math.eigenpairs import eigenpairs
from svdllm.compression.math.pullback import Pullback
from svdllm.compression.math.symmetric import ROWS, cholesky_in_place, solved_by_root, symmetric_product

# Directions below this share of the leading energy get the scale of this share. The data never excites them, and an
# unbounded 1/scale would only cost range in half precision. The product of the factors does not change.
ENERGY_FLOOR = 1e-12
# Least ratio of the diagonal of a Cholesky factor of W^T G W for which it stands in for Householder's QR.
WELL_CONDITIONED = 1e-3
# Least ratio at which W R^-1 loses nothing in float32.
WELL_IN_FLOAT32 = 1 / 32


class Spectrum(NamedTuple):
    """Eigenvalues of ``L W C W^T L^T`` and the directions ``U`` that belong to the first of them.

    The optimum of rank ``r`` is ``basis[:, :r] @ rows(W)[:r]``.
    """

    energies_K: Tensor  # float64, descending, not negative; their sum is ||L W S||_F^2
    basis_OD: Tensor  # float64, L^-1 U; orthonormal columns where there is no left metric
    dual_DO: Tensor | None = None  # float64, U^T L; None stands for the transposed basis
    rows_DI: Tensor | None = None  # float64, U^T L W, in place of the dual of a tall weight

    def rows(self, weight_OI: Tensor, depth: int | None = None) -> Tensor:
        """The first rows of ``U^T L W`` (``D x I``), in the wider dtype of weight and directions, float32 at least."""
        if self.rows_DI is not None:
            return self.rows_DI[:depth]
        product = torch.promote_types(torch.promote_types(weight_OI.dtype, self.basis_OD.dtype), torch.float32)
        dual_DO = self.basis_OD.mT if self.dual_DO is None else self.dual_DO
        return dual_DO[:depth].to(product) @ weight_OI.to(product)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Spectrum:
        """Moves the spectrum to a device. The directions get the ``dtype``; the energies stay float64."""
        directions = (each if each is None else each.to(device, dtype) for each in self[2:])
        return Spectrum(self.energies_K.to(device), self.basis_OD.to(device, dtype), *directions)


def output_spectrum(
    weight_OI: Tensor,
    gram: Tensor | None,
    depth: int | None = None,
    *,
    left: Tensor | Pullback | None = None,
    dtype: torch.dtype = torch.float64,
) -> Spectrum:
    """Spectrum of a weight in the metric of its inputs (and outputs), by one ``eigh`` of the smaller side.

    Args:
        weight_OI: the weight, any float dtype.
        gram: the right metric, ``None``, ``(I,)`` or ``(I, I)``.
        depth: how many directions to return; all ``min(O, I)`` by default. 0 takes the least time.
        left: the left metric ``G = L^T L``, positive definite; identity by default. A pullback is for a tall weight.
        dtype: of the directions. With float32, large weights are decomposed in float32 as far as that loses nothing
            (``eigenpairs``).

    Raises:
        torch.linalg.LinAlgError: the eigenvalue iteration does not converge (non-finite input), or the left metric is
            not positive definite.
    """
    out_features, in_features = weight_OI.shape
    depth = min(out_features, in_features) if depth is None else depth
    if out_features > in_features:
        spectrum = _tall_spectrum(weight_OI, gram, depth, left, dtype)
        if spectrum is not None:
            return spectrum
    if isinstance(left, Pullback):
        columns_OI, factor_II = left.factors(weight_OI)
        energies_K, basis_ID = eigenpairs(factor_II, gram, depth, dtype)
        basis_ID = basis_ID.double()
        return Spectrum(energies_K, (columns_OI @ basis_ID).to(dtype), rows_DI=(basis_ID.mT @ factor_II).to(dtype))
    weight_OI = weight_OI.double()
    if left is not None:
        left_OO = torch.linalg.cholesky(left.double()).mT
        energies_K, basis_OD, *_ = output_spectrum(left_OO @ weight_OI, gram, depth, dtype=dtype)
        basis_OD = basis_OD.double()
        unwhitened_OD = torch.linalg.solve_triangular(left_OO, basis_OD, upper=True)
        return Spectrum(energies_K, unwhitened_OD.to(dtype), (basis_OD.mT @ left_OO).to(dtype))
    if out_features <= in_features:
        return Spectrum(*eigenpairs(weight_OI, gram, depth, dtype))
    # W = Q R: the directions stay orthonormal and inside the column space of W even where the data has no energy.
    columns_OI, triangle_II = torch.linalg.qr(weight_OI)
    energies_K, basis_ID = eigenpairs(triangle_II, gram, depth, dtype)
    return Spectrum(energies_K, columns_OI.to(dtype) @ basis_ID)


def _tall_spectrum(
    weight_OI: Tensor, gram: Tensor | None, depth: int, left: Tensor | Pullback | None, dtype: torch.dtype
) -> Spectrum | None:
    """Spectrum of a tall weight without a factor of anything as large as its outputs; None if it is ill-conditioned.

    With ``R`` from the Cholesky factorisation ``W^T G W = R^T R``, ``L W`` is ``Q R``, and the eigenvectors ``E`` of
    ``R C R^T`` give ``U = Q E``, ``L^-1 U = W R^-1 E`` and ``U^T L W = E^T R``. The loss of orthogonality is about
    ``eps cond(L W)^2``.
    """
    factor_II, info = torch.linalg.cholesky_ex(_weighed_gram(weight_OI, left))
    conditioning = float(factor_II.diagonal().min() / factor_II.diagonal().max())
    if info.item() or not conditioning > WELL_CONDITIONED:
        return None
    energies_K, basis_ID = eigenpairs(factor_II.mT, gram, depth, dtype)
    inputs_ID = torch.linalg.solve_triangular(factor_II.mT, basis_ID.double(), upper=True)
    if left is None:
        product = dtype if conditioning > WELL_IN_FLOAT32 else torch.float64
        return Spectrum(energies_K, (weight_OI.to(product) @ inputs_ID.to(product)).to(dtype))
    basis_OD = weight_OI.new_empty(len(weight_OI), inputs_ID.shape[1], dtype=dtype)
    for rows_RI, basis_RD in zip(weight_OI.split(ROWS), basis_OD.split(ROWS), strict=True):
        basis_RD.copy_(rows_RI.double() @ inputs_ID)
    return Spectrum(energies_K, basis_OD, rows_DI=(basis_ID.double().mT @ factor_II.mT).to(dtype))


def _weighed_gram(weight_OI: Tensor, left: Tensor | Pullback | None) -> Tensor:
    """``W^T G W``, float64."""
    if isinstance(left, Pullback):
        return left.gram(weight_OI)
    weight_OI = weight_OI.double()
    return symmetric_product(weight_OI.mT, weight_OI if left is None else left.double() @ weight_OI)


def energy_alone(weight_OI: Tensor, gram: Tensor | None, left: Tensor | Pullback | None = None) -> Spectrum:
    """The whole energy ``||L W S||_F^2`` as a spectrum of one value, without directions."""
    no_directions = weight_OI.new_zeros(len(weight_OI), 0, dtype=torch.float64)
    if isinstance(left, Pullback):  # tr(W^T G W C)
        left_OI, weight_OI = left.gram(weight_OI), torch.eye(weight_OI.shape[1]).to(no_directions)
    else:
        weight_OI = weight_OI.double()
        left_OI = weight_OI if left is None else left.double() @ weight_OI
    weighted_OI = weight_OI
    if gram is not None:
        weighted_OI = weight_OI * gram.double() if gram.ndim == 1 else weight_OI @ gram.double()
    return Spectrum((left_OI * weighted_OI).sum()[None].clamp_min(0), no_directions)


def factorise(weight_OI: Tensor, spectrum: Spectrum, rank: int) -> tuple[Tensor, Tensor]:
    """``svd_u`` (``O x R``) and ``svd_v`` (``R x I``) of a rank, float64.

    ``U_r (U_r^T W)``, or ``L^-1 U_r (U_r^T L W)``, with the square root of the singular values on either side, as in
    Algorithm 1 of the paper. The scales are relative to the leading one and carry the size of ``W``, so they depend
    neither on the scale of the data nor on ``rank``. The factors of a smaller rank are the first columns and rows of
    these, to the last bit: the product is taken with the whole basis, because products of other sizes round
    differently. It is taken in float32 if weight and basis are no wider.
    """
    v_RI = spectrum.rows(weight_OI)[:rank].double()
    scale_R = _balancing_scales(weight_OI.double(), spectrum.energies_K.double())[:rank]
    return spectrum.basis_OD[:, :rank] * scale_R, v_RI / scale_R[:, None]


def shrunk_to_diagonal(gram: Tensor | None, amount: float) -> Tensor | None:
    """``(1 - a) C + a diag(C)``, in place: less trust in correlations that the calibration text happens to have."""
    if gram is None or gram.ndim == 1 or amount == 0:
        return gram
    diagonal_I = gram.diagonal().clone()
    gram.mul_(1 - amount).diagonal().copy_(diagonal_I)
    return gram


def without_zeros(values: Tensor) -> Tensor:
    """Replaces zeros by the smallest value above zero, or by 1: a metric of zero would leave a channel undefined."""
    active = values[values > 0]
    return values.clamp_min(float(active.min()) if active.numel() else 1.0)


def equal_energies(weights: Sequence[Tensor], gram: Tensor | None) -> Tensor:
    """The left metric (``O x O``, diagonal) of stacked weights in which the outputs of each weight have energy 1."""
    rows = []
    for weight_OI in weights:
        weight_OI = weight_OI.double()
        weighted_OI = weight_OI if gram is None else weight_OI * gram if gram.ndim == 1 else weight_OI @ gram
        energy = (weighted_OI * weight_OI).sum()
        rows.append((1 / energy if energy > 0 else torch.ones_like(energy)).expand(len(weight_OI)))
    return torch.diag(torch.cat(rows))


def tail_energies(energies_K: Tensor) -> Tensor:
    """Squared loss at every rank at once: entry ``r`` is ``sum_{i >= r} energies[i]``; ``K + 1`` entries."""
    tails_K = energies_K.double().flip(0).cumsum(0).flip(0)
    return torch.cat([tails_K, tails_K.new_zeros(1)])


def corrected_bias(
    weight_OI: Tensor, u_OR: Tensor, v_RI: Tensor, dense_mean_I: Tensor, mean_I: Tensor, bias_O: Tensor | None
) -> Tensor:
    """``b + W m - U V m'`` (``O``, float64): the mean output for the mean input ``m'`` is the dense one for ``m``."""
    bias = weight_OI.double() @ dense_mean_I.double() - u_OR.double() @ (v_RI.double() @ mean_I.double())
    return bias if bias_O is None else bias + bias_O.double()


def anchored(weight_OI: Tensor, gram_II: Tensor, missing_OI: Tensor | None, *, overwrite: bool = False) -> Tensor:
    """``W* = W + M X'^T S'^-1``, float64: what to approximate on the compressed stream.

    ``S' = X' X'^T`` is the Gram of the inputs that the compressed blocks before this one make of the text, and ``M`` is
    what the outputs ``W X'`` lack. For ``M = W (X - X')``, ``W* X'`` is the regression that comes nearest to the
    outputs ``W X`` of the dense model (AA-SVD).

    Args:
        missing_OI: ``M X'^T``; nothing for None.
        overwrite: makes ``gram_II`` the transposed Cholesky factor of ``S'`` and ``missing_OI`` the result, if there is
            anything missing.

    Raises:
        torch.linalg.LinAlgError: ``S'`` is not positive definite; shrink it.
    """
    if missing_OI is None:
        return weight_OI.double()
    root_II, found = cholesky_in_place(gram_II if overwrite else gram_II.clone())
    if not found:
        raise torch.linalg.LinAlgError("the Gram of the inputs is not positive definite")  # pyright: ignore[reportPrivateImportUsage]
    star_OI = missing_OI if overwrite else missing_OI.clone()
    for weight_RI, star_RI in zip(weight_OI.split(ROWS), star_OI.split(ROWS), strict=True):
        star_RI.copy_(weight_RI.double() + solved_by_root(root_II, star_RI))
    return star_OI


def anchored_with_pullback(
    weight_OI: Tensor, gram_II: Tensor, missing_II: Tensor | None, left: Pullback
) -> tuple[Tensor, Pullback]:
    """``W* = W T`` of ``anchored`` and its left metric, where ``M`` is ``W`` times a change of the inputs.

    Args:
        missing_II: the product of this change with ``X'^T``; nothing for None.

    Raises:
        torch.linalg.LinAlgError: ``S'`` is not positive definite; shrink it.
    """
    if missing_II is None:
        return weight_OI.double(), left
    transform_II = anchored(torch.eye(len(gram_II)).to(gram_II), gram_II, missing_II)
    return weight_OI.double() @ transform_II, left.after(transform_II)


def _balancing_scales(weight_OI: Tensor, energies_K: Tensor) -> Tensor:
    """Square roots of the singular values, relative to the leading one and scaled by the size of the weight."""
    leading = energies_K[0]
    if leading <= 0:
        return torch.ones_like(energies_K)
    mean_square = weight_OI.square().sum() / energies_K.numel()
    return (energies_K / leading).clamp_min(ENERGY_FLOOR).pow(0.25) * mean_square.pow(0.25)
