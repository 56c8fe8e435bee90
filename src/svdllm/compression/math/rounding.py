"""Rounds weights to few bits: groups of a row share a scale, and errors are fed back in the metric of the inputs.

Shape suffixes: ``O`` out_features (rows), ``I`` in_features, ``G`` groups of a row, ``S`` inputs of a group.

A weight is ``scale * code``. Codes are the integers from ``-half`` to ``half - 1`` with ``half = 2^(bits - 1)``. Scales
may be negative, so that the longer side of the codes serves the larger end of a group; there is no zero point. Rows
are independent problems: ``min (w - w') C (w - w')^T`` for the Gram ``C`` of the inputs. Rows of several matrices, in
several numbers of bits, can thus be rounded at once.

Sources: GPTQ (arXiv 2210.17323) for the feedback, with groups that are fixed beforehand and columns in descending
order of ``diag(C)``; least-squares scales, as the k-quants of llama.cpp.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Share of the mean of diag(C) that is added to it.
DAMPING = 0.01
# Columns whose errors are gathered before they are fed back to the columns after them in one product.
PANEL = 128
# Scales that are tried for a group, as shares of the one that just covers its largest value: in few bits, large values
# are cut.
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6)
NOT_CUT = 16  # with as many codes on a side, none is


class Rounded(NamedTuple):
    """A matrix in few bits."""

    codes_OI: Tensor  # int8
    scales_OG: Tensor  # in the dtype that they are stored in

    @property
    def matrix(self) -> Tensor:
        """The matrix that the codes stand for (``O x I``), in the dtype of the scales."""
        return (self._by_group() * self.scales_OG[..., None]).flatten(1)

    def _by_group(self) -> Tensor:
        return self.codes_OI.unflatten(1, (self.scales_OG.shape[1], -1)).to(self.scales_OG.dtype)


def squared_errors(weight_OI: Tensor, rounded_OI: Tensor, gram_II: Tensor | None) -> Tensor:
    """The squared error of every row (``O``) in the metric of the inputs."""
    error_OI = weight_OI - rounded_OI.to(weight_OI.dtype)
    return ((error_OI if gram_II is None else error_OI @ gram_II.to(error_OI.dtype)) * error_OI).sum(1)


def searched_scales(
    weight_OI: Tensor, half_O: Tensor, group_size: int, importance_I: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The scale of every group (``O x G``) with which the nearest codes lose least, in a dtype.

    Args:
        half_O: ``2^(bits - 1)`` of every row; the same for all.
        importance_I: weights of the squared errors; equal by default.
    """
    values_OGS = weight_OI.unflatten(1, (-1, group_size))
    shape = values_OGS.shape[1:]
    importance_GS = torch.ones(shape).to(weight_OI) if importance_I is None else importance_I.to(weight_OI).view(shape)
    half_O11 = half_O.to(weight_OI)[:, None, None]
    largest_OG1 = values_OGS.gather(2, values_OGS.abs().argmax(2, keepdim=True))
    best_OG1, least_OG1 = torch.zeros_like(largest_OG1), torch.full_like(largest_OG1, torch.inf)
    clips = CLIPS if float(half_O.min()) < NOT_CUT else CLIPS[:1]
    for sign in (-1.0, 1.0):
        for clip in clips:
            scale_OG1 = _stored(sign * clip / half_O11 * largest_OG1, dtype)
            for _ in range(2):  # as it is, and by least squares for its codes
                codes_OGS = _nearest(values_OGS, scale_OG1, half_O11)
                error_OG1 = ((values_OGS - codes_OGS * scale_OG1).square() * importance_GS).sum(2, keepdim=True)
                better = error_OG1 < least_OG1
                best_OG1 = torch.where(better, scale_OG1, best_OG1)
                least_OG1 = torch.where(better, error_OG1, least_OG1)
                weighted_OGS = codes_OGS * importance_GS
                norm_OG1 = (weighted_OGS * codes_OGS).sum(2, keepdim=True)
                fitted_OG1 = (weighted_OGS * values_OGS).sum(2, keepdim=True) / norm_OG1.clamp_min(1e-30)
                scale_OG1 = _stored(torch.where(norm_OG1 > 0, fitted_OG1, scale_OG1), dtype)
    return best_OG1[..., 0].to(dtype)


def round_to_nearest(weight_OI: Tensor, half_O: Tensor, scales_OG: Tensor) -> Rounded:
    """Rounds every weight to the nearest code of its group."""
    values_OGS = weight_OI.unflatten(1, (scales_OG.shape[1], -1))
    codes_OGS = _nearest(values_OGS, scales_OG.to(weight_OI)[..., None], half_O.to(weight_OI)[:, None, None])
    return Rounded(codes_OGS.flatten(1).to(torch.int8), scales_OG)


def round_with_feedback(
    weight_OI: Tensor, gram_II: Tensor, half_O: Tensor, scales_OG: Tensor, damping: float = DAMPING
) -> Rounded:
    """Rounds one column after the other; what a column loses is made up by those after it (GPTQ).

    A row that loses less with the nearest codes gets these, so no row is worse than rounded to nearest.

    Raises:
        torch.linalg.LinAlgError: the Gram has NaN or infinite values.
    """
    order_I = gram_II.diagonal().argsort(descending=True, stable=True)
    factor_II = feedback_factor(gram_II[order_I][:, order_I], damping).to(weight_OI)
    scales_OI = scales_OG.to(weight_OI).repeat_interleave(weight_OI.shape[1] // scales_OG.shape[1], 1)[:, order_I]
    codes_OI = _fed_back(weight_OI[:, order_I], factor_II, half_O.to(weight_OI), scales_OI)
    fed_back = Rounded(codes_OI[:, order_I.argsort()].to(torch.int8), scales_OG)
    nearest = round_to_nearest(weight_OI, half_O, scales_OG)
    fed_back_O, nearest_O = (squared_errors(weight_OI, each.matrix, gram_II) for each in (fed_back, nearest))
    codes_OI = torch.where((fed_back_O < nearest_O)[:, None], fed_back.codes_OI, nearest.codes_OI)
    return Rounded(codes_OI, scales_OG)


def round_rows(
    weight_OI: Tensor, gram_II: Tensor | None, half_O: Tensor, group_size: int, dtype: torch.dtype
) -> Rounded:
    """Rounds rows, each to its number of bits: searched scales, then feedback in the metric of the inputs.

    Args:
        weight_OI: float32 or float64, which is computed in.
        gram_II: of the inputs; without it, or with the diagonal of one, every weight gets its nearest code.
        half_O: ``2^(bits - 1)`` of every row.
        group_size: inputs that share a scale; divides ``in_features``.
        dtype: of the scales.
    """
    gram_II = None if gram_II is None else gram_II.to(weight_OI)
    diagonal_I = gram_II if gram_II is None or gram_II.ndim == 1 else gram_II.diagonal()
    scales_OG = torch.empty(len(weight_OI), weight_OI.shape[1] // group_size, dtype=dtype, device=weight_OI.device)
    for half in half_O.unique():
        rows = half_O == half
        scales_OG[rows] = searched_scales(weight_OI[rows], half_O[rows], group_size, diagonal_I, dtype)
    if gram_II is None or gram_II.ndim == 1:
        return round_to_nearest(weight_OI, half_O, scales_OG)
    return round_with_feedback(weight_OI, gram_II, half_O, scales_OG)


def feedback_factor(gram_II: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of a Gram (float64), damped until it is positive definite."""
    gram_II = gram_II.double()
    mean = gram_II.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    eye_II = torch.eye(len(gram_II), dtype=torch.float64, device=gram_II.device)
    for _ in range(8):
        lower_II, info = torch.linalg.cholesky_ex(gram_II + damping * mean * eye_II)
        if info.item() == 0:
            return torch.linalg.cholesky(torch.cholesky_inverse(lower_II), upper=True)
        damping *= 10
    raise torch.linalg.LinAlgError("the Gram is not finite")  # pyright: ignore[reportPrivateImportUsage]


def _fed_back(weight_OI: Tensor, factor_II: Tensor, half_O: Tensor, scales_OI: Tensor) -> Tensor:
    """The codes (``O x I``, as floats) of columns that are rounded from the first to the last."""
    left_IO, scales_IO = weight_OI.mT.clone(), scales_OI.mT.contiguous()  # a column in one piece of memory
    codes_IO = torch.zeros_like(left_IO)
    inverse_IO = torch.where(scales_IO != 0, 1 / scales_IO, 0.0)
    size = len(left_IO)
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        errors_PO = torch.empty_like(left_IO[start:stop])
        for at in range(start, stop):
            codes_O = torch.minimum((left_IO[at] * inverse_IO[at]).round_(), half_O - 1)
            codes_IO[at] = torch.maximum(codes_O, -half_O)
            error_O = (left_IO[at] - codes_IO[at] * scales_IO[at]).div_(factor_II[at, at])
            left_IO[at + 1 : stop].addr_(factor_II[at, at + 1 : stop], error_O, alpha=-1)
            errors_PO[at - start] = error_O
        left_IO[stop:].addmm_(factor_II[start:stop, stop:].mT, errors_PO, alpha=-1)
    return codes_IO.mT


def _nearest(values: Tensor, scales: Tensor, half: Tensor) -> Tensor:
    codes = torch.where(scales != 0, values / scales, 0.0).round_()
    return torch.maximum(torch.minimum(codes, half - 1), -half)


def _stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    return scales.to(dtype).to(scales.dtype)
