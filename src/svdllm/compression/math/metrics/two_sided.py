"""The two-sided metric: errors of the outputs weighted by the Gram of the loss's gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from svdllm.common.settings import setting
from svdllm.compression.math.metrics.rows import LeftMetric, Metric
from svdllm.compression.math.metrics.shared_settings import SharedSettings
from svdllm.compression.math.pullback import Pullback
from svdllm.compression.math.statistics import GradientGram, PulledBack
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
        gt=0,
        le=1,
    )


def _left(target: Target, gradient_OO: Tensor, settings: TwoSidedSettings) -> Tensor:
    """One block for each linear, in proportion to its gradients where there are several."""
    sizes = _sizes(target)
    traces_P = torch.stack([own.sum() for own in gradient_OO.diagonal().split(sizes)])
    blocks, start = [], 0
    for size, (kept, added) in zip(sizes, _shares(target, traces_P, settings), strict=True):
        block_OO = kept * gradient_OO[start : start + size, start : start + size]
        block_OO.diagonal().add_(added)
        blocks.append(block_OO)
        start += size
    return torch.block_diag(*blocks) if target.parts else blocks[0]


def _pullback(target: Target, value: PulledBack, settings: TwoSidedSettings) -> Pullback:
    """The pullback of ``_left``."""
    shares = _shares(target, value.traces_P, settings)
    product_II = value.products[0].mul_(shares[0][0])
    for own_II, (kept, _) in zip(value.products[1:], shares[1:], strict=True):
        product_II.add_(kept * own_II)
    added = [added.expand(size) for size, (_, added) in zip(_sizes(target), shares, strict=True)]
    return Pullback(product_II, torch.cat(added))


def _sizes(target: Target) -> list[int]:
    """The out_features of each linear."""
    return [size for _, size in target.parts] or [target.out_features]


def _shares(target: Target, traces_P: Tensor, settings: TwoSidedSettings) -> list[tuple[Tensor, Tensor]]:
    """For each linear ``k`` and ``a`` of its metric ``k G + a I``, whose mean diagonal is 1 if it is alone.

    A linear without gradients has the identity. Of several linears, each keeps the share of its gradients; that of one
    of ``input_only`` is a multiple of the identity.
    """
    input_only = _input_only(target, settings) if target.parts else ()
    whole = (traces_P.sum() / target.out_features).clamp_min(torch.finfo(traces_P.dtype).tiny)
    shares = []
    for name, size, trace in zip(target.linears, _sizes(target), traces_P, strict=True):
        mean = trace / size
        share = (mean / whole).clamp_min(LEAST_SHARE) if target.parts else torch.ones_like(mean)
        amount = 1.0 if name in input_only or mean <= 0 else settings.gradient_shrinkage
        shares.append((share * (1 - amount) / mean if amount < 1 else torch.zeros_like(mean), share * amount))
    return shares


def _weighs(target: Target, settings: TwoSidedSettings) -> bool:
    return len(_input_only(target, settings)) < len(target.linears)


def _input_only(target: Target, settings: TwoSidedSettings) -> list[str]:
    """The linears of a target whose outputs are not weighted by gradients."""
    return [name for name in target.linears if any(matches(pattern, name) for pattern in settings.input_only)]


TWO_SIDED = Metric(
    name="two-sided",
    summary="weighted by the gradients of the loss; one backward pass more",
    source="Kronecker approximation of the Fisher matrix (docs/method.md)",
    left=LeftMetric(statistic=GradientGram, of=_left, pullback=_pullback, weighs=_weighs),
    settings=TwoSidedSettings,
)
