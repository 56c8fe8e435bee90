"""The table of methods: each is the same truncation in another metric, ``min ||L (W - W') S||_F`` over rank ``r``.

A method names the statistics it needs, of the inputs or of the loss's gradients, and turns them into ``C = S S^T`` and
``G = L^T L``. A new method is a new row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from svdllm.compression.math.statistics import Gram, MeanAbsolute


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table.

    ``right(statistic, alpha)`` returns the metric ``C = S S^T`` as ``None`` (identity), ``(in,)`` (diagonal) or
    ``(in, in)``; ``statistic`` is the value accumulated over the calibration tokens, or ``None`` without any.
    ``left(fisher)`` returns the diagonal of ``G = L^T L`` (``out``) from what was accumulated in the reverse walk.
    """

    name: str
    summary: str
    source: str
    statistic: type[Gram] | type[MeanAbsolute] | None
    right: Callable[[Tensor | None, float], Tensor | None]
    left: Callable[[Tensor], Tensor] | None = None

    @property
    def needs_tokens(self) -> bool:
        return self.statistic is not None or self.left is not None


def _asvd(mean_absolute: Tensor | None, alpha: float) -> Tensor:
    """``S = diag(mean|x|^alpha)``; a channel that is never active gets the smallest scale that is."""
    assert mean_absolute is not None
    return _without_zeros(mean_absolute).pow(2 * alpha)


def _fwsvd(fisher: Tensor) -> Tensor:
    """``G = diag(I_i)``, ``I_i = sum_j (dL/dW_ij)^2``; a row that never had a gradient gets the smallest that was."""
    positive = _without_zeros(fisher)
    return positive / positive.mean()


def _without_zeros(values: Tensor) -> Tensor:
    """What is zero becomes the smallest value above: a metric of zero would leave a channel undefined."""
    active = values[values > 0]
    return values.clamp_min(float(active.min()) if active.numel() else 1.0)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="svd-llm",
            summary="truncation-aware: the metric is the Gram of the inputs",
            source="SVD-LLM, arXiv 2403.07378",
            statistic=Gram,
            right=lambda gram, alpha: gram,
        ),
        Method(
            name="svd",
            summary="plain SVD of the weight; needs no data",
            source="Eckart and Young, 1936",
            statistic=None,
            right=lambda statistic, alpha: None,
        ),
        Method(
            name="asvd",
            summary="input channels scaled by mean|x|^alpha",
            source="ASVD, arXiv 2312.05821",
            statistic=MeanAbsolute,
            right=_asvd,
        ),
        Method(
            name="fwsvd",
            summary="output rows weighted by the Fisher information of their weights; needs gradients",
            source="FWSVD, arXiv 2207.00112",
            statistic=None,
            right=lambda statistic, alpha: None,
            left=_fwsvd,
        ),
    )
}
