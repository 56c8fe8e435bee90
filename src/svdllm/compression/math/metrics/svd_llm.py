"""SVD-LLM (arXiv 2403.07378): the metric is the Gram of the inputs."""

from __future__ import annotations

from torch import Tensor

from svdllm.compression.math.linalg import shrunk_to_diagonal
from svdllm.compression.math.metrics.rows import Method
from svdllm.compression.math.metrics.shared_settings import SharedSettings
from svdllm.compression.math.statistics import Gram


def _right(gram_II: Tensor | None, settings: SharedSettings) -> Tensor | None:
    return shrunk_to_diagonal(gram_II, settings.shrinkage)


SVD_LLM = Method(
    name="svd-llm",
    summary="truncation-aware, by the Gram of the inputs",
    source="SVD-LLM, arXiv 2403.07378",
    statistic=Gram,
    right=_right,
    has_gram=True,
)
