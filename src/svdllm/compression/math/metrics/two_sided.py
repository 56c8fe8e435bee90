"""The two-sided metric: errors of the outputs weighed by the Gram of the loss's gradients."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from svdllm.common.settings import setting
from svdllm.compression.math.linalg import shrunk_to_mean
from svdllm.compression.math.metrics.rows import LeftMetric, Metric
from svdllm.compression.math.metrics.shared_settings import SharedSettings
from svdllm.compression.math.statistics import GradientGram
from svdllm.models.linears import matches
from svdllm.models.structure import Target

# Keeps the left metric of several linears defined where one of them has no gradient.
LEAST_SHARE = 1e-6


class TwoSidedSettings(SharedSettings):
    """Settings of the metric two-sided."""

    gradient_shrinkage: float = setting(
        0.3,
        "Share of the mean diagonal mixed into the gradients' Gram (two-sided).",
        panel="Method",
        only_with={"metric": ("two-sided",)},
        gt=0,
        le=1,
    )


def _left(target: Target, gradient_OO: Tensor, settings: TwoSidedSettings) -> Tensor:
    if target.parts:
        return joint_left_metric(target, gradient_OO, _input_only(target, settings), settings.gradient_shrinkage)
    return shrunk_to_mean(gradient_OO, settings.gradient_shrinkage)


def joint_left_metric(target: Target, gradient_OO: Tensor, input_only: Collection[str], shrinkage: float) -> Tensor:
    """The left metric of several linears with one first factor: one block for each, in proportion to its gradients.

    A linear of ``input_only`` keeps its proportion; its block is a multiple of the identity.
    """
    whole = gradient_OO.diagonal().mean().clamp_min(torch.finfo(gradient_OO.dtype).tiny)
    blocks, start = [], 0
    for name, size in target.parts:
        own_OO = gradient_OO[start : start + size, start : start + size]
        share = (own_OO.diagonal().mean() / whole).clamp_min(LEAST_SHARE)
        blocks.append(share * shrunk_to_mean(own_OO, 1.0 if name in input_only else shrinkage))
        start += size
    return torch.block_diag(*blocks)


def _weighs(target: Target, settings: TwoSidedSettings) -> bool:
    return len(_input_only(target, settings)) < len(target.linears)


def _input_only(target: Target, settings: TwoSidedSettings) -> list[str]:
    """The linears of a target that the gradients do not weigh."""
    return [name for name in target.linears if any(matches(pattern, name) for pattern in settings.input_only)]


TWO_SIDED = Metric(
    name="two-sided",
    summary="weighted by the gradients of the loss; one backward pass more",
    source="Kronecker approximation of the Fisher matrix (docs/method.md)",
    left=LeftMetric(statistic=GradientGram, of=_left, weighs=_weighs),
    settings=TwoSidedSettings,
)
