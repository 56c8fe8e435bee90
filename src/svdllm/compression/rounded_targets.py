"""Rounds targets to few bits by what the analysis knows of their inputs, and measures what they lose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svdllm.compression.forms.bits import group_size_of
from svdllm.compression.math.rounding import Rounded, round_rows
from svdllm.models.structure import Target


def rounded_each(
    target: Target,
    weight_OI: Tensor,
    metric: Tensor | None,
    bits: Sequence[int],
    dtype: torch.dtype,
    group_size: int | None = None,
) -> list[Rounded]:
    """A target in each number of bits, all rounded in one pass.

    Args:
        metric: right metric of its inputs.
        dtype: of the scales.
        group_size: inputs that share a scale; what is usual by default.
    """
    exact = torch.float64 if weight_OI.dtype == torch.float64 else torch.float32
    rows = len(weight_OI)
    half_O = torch.tensor([2.0 ** (each - 1) for each in bits], device=weight_OI.device).repeat_interleave(rows)
    stacked_OI = weight_OI.to(exact).repeat(len(bits), 1)
    rounded = round_rows(stacked_OI, metric, half_O, group_size or group_size_of(target), dtype)
    return [Rounded(*pair) for pair in zip(rounded.codes_OI.split(rows), rounded.scales_OG.split(rows), strict=True)]


def rounding_errors(
    target: Target,
    weight_OI: Tensor,
    metric: Tensor | None,
    left_OO: Tensor | None,
    bits: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Bits, and the squared errors in both metrics (2 x bits, float64)."""
    errors = []
    for rounded in rounded_each(target, weight_OI, metric, bits, dtype):
        error_OI = weight_OI.double() - rounded.matrix.double()
        weighted_OI = error_OI
        if metric is not None:
            metric = metric.double()
            weighted_OI = error_OI * metric if metric.ndim == 1 else error_OI @ metric
        if left_OO is not None:
            error_OI = left_OO.double() @ error_OI
        errors.append(float((weighted_OI * error_OI).sum()))
    return torch.tensor([list(bits), errors], dtype=torch.float64)
