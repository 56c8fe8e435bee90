"""The rows of the tables of metrics.

Every method is the same truncation in another metric, ``min ||L (W - W') S||_F`` over rank ``r``. The right metric
``C = S S^T`` is made from a statistic of the inputs, the left one ``G = L^T L`` from one of the loss's gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from svdllm.compression.math.metrics.shared_settings import SharedSettings
from svdllm.compression.math.pullback import Pullback
from svdllm.compression.math.statistics import BackwardStatistic, Gram, PulledBack, Statistic
from svdllm.models.structure import Target


@dataclass(frozen=True, kw_only=True)
class LeftMetric:
    """How errors of the outputs are weighted, from gradients of the loss.

    ``weighs(target, settings)`` says whether a target has a left metric; without, it keeps the identity.
    ``of(target, value, settings)`` returns ``G`` (``out x out``) from the value of the statistic. Where there is a
    ``pullback``, the same of ``GradientPullback``, a tall target's ``G`` need not be formed.
    """

    statistic: Callable[[int, torch.device | str], BackwardStatistic]  # of out_features
    of: Callable[[Target, Tensor, Any], Tensor]
    pullback: Callable[[Target, PulledBack, Any], Pullback] | None = None
    weighs: Callable[[Target, Any], bool] = lambda target, settings: True

    def metric(self, target: Target, value: Tensor | PulledBack, settings: Any) -> Tensor | Pullback:
        """The metric of a target, in the form that the statistic has."""
        if isinstance(value, PulledBack):
            assert self.pullback is not None
            return self.pullback(target, value, settings)
        return self.of(target, value, settings)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A row of ``METRICS``: how the outputs are weighted. ``left`` is None where all count alike."""

    name: str
    summary: str
    source: str
    left: LeftMetric | None = None
    settings: type[BaseModel] = BaseModel

    @property
    def reads(self) -> frozenset[str]:
        """The settings that do nothing without this row, or another that reads them."""
        return _reads(self)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of ``METHODS``: how the inputs are weighted, and perhaps the outputs.

    ``right(value, settings)`` returns ``C`` as ``None`` (identity), ``(in,)`` (diagonal) or ``(in, in)``. ``value`` is
    that of the statistic over the calibration tokens, or None without a statistic, and may be changed in place.
    ``settings`` is the recipe, which has the fields of the row's own ``settings``.

    ``has_gram`` says that ``C`` is the Gram of the inputs. Shrinkage, the correction of biases, a sequential
    calibration and the metrics with a left side build on it.
    """

    name: str
    summary: str
    source: str
    right: Callable[[Tensor | None, Any], Tensor | None]
    statistic: type[Statistic] | None = None
    left: LeftMetric | None = None
    has_gram: bool = False
    settings: type[BaseModel] = BaseModel

    @property
    def reads(self) -> frozenset[str]:
        """The settings that do nothing without this row, or another that reads them."""
        return _reads(self)

    @property
    def needs_tokens(self) -> bool:
        """Whether the calibration text runs through the model."""
        return self.statistic is not None or self.left is not None

    @property
    def collects_gram(self) -> bool:
        """Whether the statistic is a Gram, which takes the time and memory of ``in x in``."""
        return self.statistic is Gram


def _reads(row: Method | Metric) -> frozenset[str]:
    own = frozenset(row.settings.model_fields) - frozenset(SharedSettings.model_fields)
    return own if row.left is None else own | {"gradient_samples"}
