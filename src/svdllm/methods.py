"""The table of methods: each is the same truncation in another metric, ``min ||(W - W') S||_F`` over rank ``r``.

A method names the statistic of the inputs it needs and turns it into ``C = S S^T``. A new method is a new row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from svdllm.statistics import Gram, MeanAbsolute


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table.

    ``right(statistic, alpha)`` returns the metric ``C = S S^T`` as ``None`` (identity), ``(in,)`` (diagonal) or
    ``(in, in)``; ``statistic`` is the value accumulated over the calibration tokens, or ``None`` without any.
    """

    name: str
    summary: str
    source: str
    statistic: type[Gram] | type[MeanAbsolute] | None
    right: Callable[[Tensor | None, float], Tensor | None]


def _asvd(mean_absolute: Tensor | None, alpha: float) -> Tensor:
    """``S = diag(mean|x|^alpha)``; a channel that is never active gets the smallest scale that is."""
    assert mean_absolute is not None
    active = mean_absolute[mean_absolute > 0]
    floor = float(active.min()) if active.numel() else 1.0
    return mean_absolute.clamp_min(floor).pow(2 * alpha)


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
    )
}
