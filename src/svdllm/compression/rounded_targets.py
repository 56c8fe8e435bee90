"""Rounds targets to few bits by what the analysis knows of their inputs, and measures what they lose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from svdllm.compression.forms.bits import fitted_rounding, group_size_of
from svdllm.compression.forms.rows import Form
from svdllm.compression.math.correction import corrected, squared_error
from svdllm.compression.math.linalg import output_spectrum, tail_energies
from svdllm.compression.math.rounding import Rounded, round_rows
from svdllm.models.structure import Target

# Weights that are rounded in one pass, and the memory that one takes.
WEIGHTS_AT_ONCE, BYTES_OF_A_WEIGHT = 2**25, 64


class Roundings(NamedTuple):
    """Squared errors of a target in both metrics.

    errors: bits, and the error in each (2 x bits, float64).
    corrections: the error at every rank of a correction, in each number of bits that may be corrected.
    """

    errors: Tensor
    corrections: Tensor | None


def rounded_each(
    target: Target,
    weight_OI: Tensor,
    metric: Tensor | None,
    bits: Sequence[int],
    dtype: torch.dtype,
    group_size: int | None = None,
) -> list[Rounded]:
    """A target in each number of bits, rounded in one pass while it is small.

    Args:
        metric: right metric of its inputs.
        dtype: of the scales.
        group_size: inputs that share a scale; what is usual by default.
    """
    exact = torch.float64 if weight_OI.dtype == torch.float64 else torch.float32
    rows, at_once = len(weight_OI), max(1, WEIGHTS_AT_ONCE // weight_OI.numel())
    made: list[Rounded] = []
    for start in range(0, len(bits), at_once):
        halves = [2.0 ** (each - 1) for each in bits[start : start + at_once]]
        half_O = torch.tensor(halves, device=weight_OI.device).repeat_interleave(rows)
        stacked_OI = weight_OI.to(exact).repeat(len(halves), 1)
        rounded = round_rows(stacked_OI, metric, half_O, group_size or group_size_of(target), dtype)
        pairs = zip(rounded.codes_OI.split(rows), rounded.scales_OG.split(rows), strict=True)
        made += [Rounded(*pair) for pair in pairs]
    return made


def rounding_errors(
    target: Target,
    weight_OI: Tensor,
    metric: Tensor | None,
    left_OO: Tensor | None,
    bits: Sequence[int],
    dtype: torch.dtype,
    corrected_bits: Sequence[int] = (),
) -> Roundings:
    """What a target loses in each number of bits, and what corrections of any rank leave of it."""
    errors, corrections = [], []
    for each, rounded in zip(bits, rounded_each(target, weight_OI, metric, bits, dtype), strict=True):
        rest_OI = weight_OI.double() - rounded.matrix.double()
        errors.append(squared_error(rest_OI, metric, left_OO))
        if each in corrected_bits:
            energies_K = output_spectrum(rest_OI, metric, 0, left=left_OO).energies_K
            corrections.append(tail_energies(energies_K))
    return Roundings(
        torch.tensor([list(bits), errors], dtype=torch.float64), torch.stack(corrections) if corrections else None
    )


def corrected_target(
    target: Target,
    weight_OI: Tensor,
    metric: Tensor | None,
    left_OO: Tensor | None,
    form: Form,
    rank: int,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The fitted tensors of a target in few bits with a correction of a rank."""
    assert form.base is not None
    assert form.base.bits is not None
    bits = form.base.bits

    def round_(matrix_OI: Tensor) -> Rounded:
        return rounded_each(target, matrix_OI, metric, [bits], dtype)[0]

    made = corrected(weight_OI, metric, left_OO, rank, round_)
    return fitted_rounding(made.rounded) | {"svd_u.weight": made.u_OR, "svd_v.weight": made.v_RI}
