"""ASVD (arXiv 2312.05821): input channels scaled by ``mean|x|^alpha``."""

from __future__ import annotations

from pydantic import BaseModel
from torch import Tensor

from svdllm.common.settings import setting
from svdllm.compression.math.linalg import without_zeros
from svdllm.compression.math.metrics.rows import Method
from svdllm.compression.math.statistics import MeanAbsolute


class AsvdSettings(BaseModel):
    """Settings of the method asvd."""

    asvd_alpha: float = setting(0.5, "Exponent of ASVD's channel scales.", panel="Method", ge=0, le=1)


def _right(mean_absolute: Tensor | None, settings: AsvdSettings) -> Tensor:
    """``S = diag(mean|x|^alpha)``; a channel that is never active gets the smallest scale above zero."""
    assert mean_absolute is not None
    return without_zeros(mean_absolute).pow(2 * settings.asvd_alpha)


ASVD = Method(
    name="asvd",
    summary="input channels scaled by mean|x|^alpha",
    source="ASVD, arXiv 2312.05821",
    statistic=MeanAbsolute,
    right=_right,
    settings=AsvdSettings,
)
