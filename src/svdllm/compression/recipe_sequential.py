"""The part of the recipe that says whose inputs a linear is fitted to."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, field_validator

from svdllm.common.settings import setting
from svdllm.compression.after_analysis import AfterAnalysis
from svdllm.models.chosen import Forms


class SequentialSettings(BaseModel):
    """The settings of a sequential calibration."""

    calibration_mode: AfterAnalysis[Literal["dense", "sequential"]] = setting(
        "sequential",
        "Whose inputs a linear is fitted to: those of the dense model, or those of the model as far as it is "
        "compressed (sequential; several forward passes more).",
        panel="Calibration",
    )
    beta: AfterAnalysis[float] = setting(
        1.0,
        "How far outputs are pulled to those of the dense model, 0 to 1 (sequential).",
        panel="Calibration",
        only_with={"calibration_mode": ("sequential",)},
        ge=0,
        le=1,
    )
    sequential_samples: AfterAnalysis[int] = setting(
        32,
        "Calibration windows of the second walk (sequential).",
        panel="Calibration",
        only_with={"calibration_mode": ("sequential",)},
        ge=1,
    )
    sequential_shrinkage: AfterAnalysis[float] = setting(
        0.5,
        "Share of the dense model's Grams, over all calibration windows, mixed into those of the second walk "
        "(sequential).",
        panel="Calibration",
        only_with={"calibration_mode": ("sequential",)},
        ge=0,
        lt=1,
    )
    residual_correction: AfterAnalysis[float] = setting(
        1.0,
        "How much of the residual stream's error, 0 to 1, the linears that add to it are fitted to make up "
        "(sequential).",
        panel="Calibration",
        only_with={"calibration_mode": ("sequential",)},
        ge=0,
        le=1,
    )

    @field_validator("beta", mode="before")
    @classmethod
    def _beta_of_older_recipes(cls, value: Any) -> Any:
        """Recipes of the first version have no beta where the calibration is dense."""
        return 1.0 if value is None else value


def digest_of(settings: SequentialSettings, forms: Forms) -> str:
    """Names a sequential calibration by all that decides it beside the analysis, which runs may share."""
    values = [getattr(settings, name) for name in SequentialSettings.model_fields]
    decisions = sorted((name, chosen.form, chosen.size) for name, chosen in forms.items())
    return hashlib.sha256(json.dumps([values, decisions]).encode()).hexdigest()[:16]
