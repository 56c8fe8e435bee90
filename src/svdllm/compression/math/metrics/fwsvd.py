"""FWSVD (arXiv 2207.00112): output rows weighted by the Fisher information of their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svdllm.compression.math.linalg import without_zeros
from svdllm.compression.math.metrics.rows import LeftMetric, Method
from svdllm.compression.math.statistics import RowFisher
from svdllm.models.structure import Target


def _left(target: Target, fisher_O: Tensor, settings: Any) -> Tensor:
    """``G = diag(I_i)``, ``I_i = sum_j (dL/dW_ij)^2``; a row without gradient gets the smallest ``I_i`` above zero."""
    positive_O = without_zeros(fisher_O)
    return torch.diag(positive_O / positive_O.mean())


FWSVD = Method(
    name="fwsvd",
    summary="output rows weighted by their Fisher information, from gradients",
    source="FWSVD, arXiv 2207.00112",
    right=lambda statistic, settings: None,
    left=LeftMetric(statistic=RowFisher, of=_left),
)
