"""The settings of a pruning run."""

from __future__ import annotations

from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from svdllm.common.errors import InputError, did_you_mean
from svdllm.common.settings import DEVICE, problems_of, setting
from svdllm.compression.recipe import Recipe

NEXT_TO_NOTHING = 1e-9  # a recipe has no ratio of 0
METHODS = ("flap", "llm-pruner", "slicegpt", "blockpruner")  # the rows of ``pruning.methods``


class Pruning(BaseModel):
    """Settings that decide the numbers of a run; frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    pruning: str = setting(
        "flap",
        f"How the model is made smaller: {', '.join(METHODS)}.",
        panel="Method",
        flag="--method",
        metavar="|".join(METHODS),
    )
    ratio: float = setting(0.2, "Share of the parameters of the linears that is removed.", panel="Method", ge=0, lt=1)
    calibration: str = setting(
        "wikitext2", "Calibration text, as of svdllm compress.", panel="Calibration", flag="--calib"
    )
    samples: int | None = setting(None, "Calibration windows.", panel="Calibration", shown_default="as published", ge=1)
    seqlen: int | None = setting(
        None, "Tokens of a calibration window.", panel="Calibration", shown_default="as published", ge=2
    )
    seed: int = setting(3, "Seed of the random windows.", panel="Calibration", ge=0)
    device: str = setting("auto", DEVICE, panel="Machine")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = setting(
        "auto", "What is computed in, as of svdllm compress.", panel="Machine"
    )
    batch_tokens: int = setting(4096, "Tokens that run through a block at once.", panel="Machine", ge=1)

    @field_validator("pruning")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(
                f"unknown method {value!r}{did_you_mean(value, METHODS) or ';'} known are {', '.join(METHODS)}"
            )
        return value

    def recipe(self, samples: int, seqlen: int) -> Recipe:
        """The recipe of a run with the same text, on the same device; windows of the method where none were chosen."""
        return Recipe(
            ratio=max(self.ratio, NEXT_TO_NOTHING),
            calibration=self.calibration,
            samples=self.samples or samples,
            seqlen=self.seqlen or seqlen,
            seed=self.seed,
            device=self.device,
            dtype=self.dtype,
            batch_tokens=self.batch_tokens,
            allow_partial=True,
        )

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def make_pruning(settings: dict[str, Any], origin: str = "the settings") -> Pruning:
    """Validates a mapping; every problem is reported at once as an InputError."""
    try:
        return Pruning(**settings)
    except ValidationError as error:
        raise InputError(f"{origin}: {problems_of(error)}") from error
