"""The recipe: the complete, serialisable description of a run. Every checkpoint has its recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from svdllm.checkpoint.quantized import NVFP4_GROUP
from svdllm.common.errors import InputError
from svdllm.common.settings import DEVICE, setting
from svdllm.compression.after_analysis import AfterAnalysis, settings_after_analysis
from svdllm.compression.math.metrics import METHODS, METRICS, LeftMetric, MethodSettings, MetricSettings
from svdllm.compression.ranks import ALLOCATIONS, AllocationSettings
from svdllm.compression.recipe_forms import FormsChoice
from svdllm.compression.recipe_parts import BUDGETS, MetricChoice
from svdllm.compression.recipe_sequential import SequentialSettings
from svdllm.models.wrapped import LANGUAGE

# The settings that choose a row, and the table of the rows.
TABLES: dict[str, Mapping[str, Any]] = {"metric": METRICS, "method": METHODS, "allocation": ALLOCATIONS}
# Defaults of a method without a Gram, which cannot use the others.
PLAIN = {"metric": "input", "shrinkage": 0.0, "allocation": "uniform", "round_to": 1, "calibration_mode": "dense"}


class Recipe(AllocationSettings, FormsChoice, SequentialSettings, MetricSettings, MetricChoice, MethodSettings):
    """Settings that decide the numbers of a run; keyword-only, frozen, unknown keys are errors.

    The defaults are the preset ``balanced``; with another method than svd-llm, or explicit ranks, they are plain. Those
    of an elastic checkpoint have no sequential calibration.
    Exactly one budget is needed to compress: ``ratio``, ``target_params``, ``target_size``, ``target_speedup`` or
    explicit ``ranks``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    part: str = setting(
        LANGUAGE,
        "The part of a wrapper (a language model with encoders of images or sound) to compress; the others are copied.",
        panel="Allocation",
    )
    ignore: tuple[str, ...] = setting(
        (),
        "Linears that stay dense; may be repeated. Searched in names like model.layers.0.mlp.up_proj.",
        panel="Allocation",
        metavar="REGEX",
    )
    allow_partial: bool = setting(
        False,
        "Compress a model of whose blocks less than half are linears that can be compressed.",
        panel="Allocation",
    )
    overrides: AfterAnalysis[dict[str, Annotated[float, Field(ge=0, lt=1)]]] = setting(
        {},
        "Another ratio for some linears; may be repeated. The first match wins; 0 leaves a linear dense.",
        panel="Allocation",
        flag="--override",
        metavar="REGEX=RATIO",
        reader="overrides",
    )
    expert_ranks: AfterAnalysis[Literal["equal", "own"]] = setting(
        "equal",
        "equal: one form and size for all experts of a layer, which run as one product on a GPU; own: one for each.",
        panel="Allocation",
    )
    round_to: AfterAnalysis[int] = setting(
        8,
        "Ranks and widths are multiples of this number, which kernels and group-wise quantisers want.",
        panel="Allocation",
        ge=1,
    )

    calibration: str = setting(
        "wikitext2",
        "Calibration text: python-docs (built in), wikitext2, c4, ptb; owner/name[:config][:split][:field] on the hub; "
        "a .txt, .jsonl, .json or .parquet file[:field]; or a mixture a:0.7,b:0.3.",
        panel="Calibration",
        flag="--calib",
    )
    samples: int = setting(256, "Calibration windows.", panel="Calibration", ge=1)
    seqlen: int = setting(2048, "Tokens of a calibration window.", panel="Calibration", ge=2)
    joint_kv: bool = setting(
        False,
        "One first factor for k_proj and v_proj of a layer, as in multi-head latent attention: a latent cache then "
        "keeps one latent for both.",
        panel="Method",
    )
    seed: int = setting(3, "Seed of the random windows.", panel="Calibration", ge=0)

    device: str = setting("auto", DEVICE, panel="Machine")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = setting(
        "auto",
        "What is computed in: auto is float32 on a CPU, the model's own dtype on a GPU. Files keep the model's dtype.",
        panel="Machine",
    )
    batch_tokens: int = setting(
        4096, "Tokens that run through a block at once; lower it when memory is short.", panel="Machine", ge=1
    )

    @model_validator(mode="before")
    @classmethod
    def _plain_defaults(cls, settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        plain: dict[str, Any] = {}
        method = METHODS.get(str(settings.get("method", cls.model_fields["method"].default)))
        if method is not None and not method.has_gram:
            plain = PLAIN
        elif settings.get("ranks") is not None:
            plain = {"allocation": "uniform", "round_to": 1}
        if settings.get("elastic"):
            plain = {"calibration_mode": "dense"} | plain
        if settings.get("factor_bits") == 4:
            plain = plain | {"round_to": NVFP4_GROUP}
        given = plain | settings
        return {"runtime": cls.default_runtime(given)} | given

    @field_validator("method", "metric", "allocation")
    @classmethod
    def _known_row(cls, value: str, info: ValidationInfo) -> str:
        table = TABLES[str(info.field_name)]
        if value not in table:
            raise ValueError(f"unknown {info.field_name} {value!r}; known are {', '.join(table)}")
        return value

    @field_validator("ignore", "input_only", "overrides", "ranks")
    @classmethod
    def _regular_expressions(cls, value: Any) -> Any:
        for pattern in value or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _fits_the_method(self) -> Recipe:
        """Refuses settings that do nothing with the method."""
        method, metric = METHODS[self.method], METRICS[self.metric]
        if metric.left is not None and method.left is not None:
            raise ValueError(f"method {method.name} and metric {metric.name} both weigh the outputs; use metric input")
        if method.has_gram:
            return self
        use = " or ".join(name for name, row in METHODS.items() if row.has_gram)
        if metric.left is not None:
            raise ValueError(
                f"metric {metric.name} weighs the Gram of the inputs by gradients; method {method.name} has no Gram, "
                f"use method {use}"
            )
        if self.shrinkage:
            raise ValueError(f"shrinkage acts on a Gram; method {method.name} has none, use method {use}")
        if self.bias_correction:
            raise ValueError(f"bias_correction needs the mean inputs of a Gram; method {method.name} has none")
        if self.calibration_mode == "sequential":
            raise ValueError(
                f"calibration_mode sequential fits to Grams of the compressed stream; method {method.name} uses none"
            )
        return self

    @model_validator(mode="after")
    def _fits_the_allocation(self) -> Recipe:
        row = ALLOCATIONS[self.allocation]
        refused = [name for name in BUDGETS if getattr(self, name) is not None and name not in row.budgets]
        if "ranks" in refused:
            raise ValueError(f"allocation {row.name} chooses ranks, and ranks are given; drop one of them")
        if "target_speedup" in refused:
            use = " or ".join(name for name, other in ALLOCATIONS.items() if "target_speedup" in other.budgets)
            raise ValueError(
                f"target_speedup is a budget of measured time, which allocation {row.name} does not count; use "
                f"allocation {use}"
            )
        if refused:
            raise ValueError(
                f"allocation {row.name} cannot keep to {refused[0]}; give a {' or '.join(row.budgets)}, or use another "
                "allocation"
            )
        return self

    @model_validator(mode="after")
    def _fits_the_budget(self) -> Recipe:
        if self.ranks is not None and (self.overrides or self.round_to > 1):
            raise ValueError("overrides and round_to do nothing to explicit ranks; write the ranks you want")
        if any(self.overrides.values()) and not self.truncates:
            raise ValueError(
                f"an override gives a rank, and none of the forms ({', '.join(self.used_forms)}) has one; name pair "
                "too, or leave the linear dense with a ratio of 0"
            )
        if self.factor_bits == 4 and self.round_to % NVFP4_GROUP:
            raise ValueError(
                f"factor_bits 4 shares a scale among {NVFP4_GROUP} inputs, and a factor of another rank gets 8 bits; "
                f"use round_to {NVFP4_GROUP} or a multiple of it"
            )
        return self

    @model_validator(mode="after")
    def _elastic_is_nested(self) -> Recipe:
        if self.elastic and (reason := self._why_not_nested()):
            raise ValueError(f"elastic writes one checkpoint from which every smaller ratio is sliced, but {reason}")
        return self

    def _why_not_nested(self) -> str | None:
        """Why a run at another ratio would not give the leading part of these factors; None if it would."""
        if isinstance(self.ratio, tuple) and len(self.ratio) > 1:
            return f"{len(self.ratio)} ratios are given; give the smallest ({min(self.ratio)}) and slice the others"
        for budget in BUDGETS[1:]:
            if getattr(self, budget) is not None:
                return f"the budget is {budget}; give a ratio, which a smaller size can have another of"
        if self.bias_correction:
            return "the biases of bias_correction belong to one rank"
        if self.calibration_mode == "sequential":
            return "a sequential calibration fits the factors of every size anew; use calibration_mode dense"
        return None

    @property
    def left_metric(self) -> LeftMetric | None:
        """How the outputs are weighted by gradients, by the metric or by the method; None where they are not."""
        return METRICS[self.metric].left or METHODS[self.method].left

    @property
    def needs_gradients(self) -> bool:
        """Whether the run needs gradients of the loss."""
        return self.left_metric is not None

    @property
    def needs_probes(self) -> bool:
        """Whether linears are truncated on trial, and the effect measured."""
        return ALLOCATIONS[self.allocation].probing is not None

    @property
    def needs_tokens(self) -> bool:
        """Whether a calibration text is read."""
        return METHODS[self.method].needs_tokens or self.needs_probes

    def analysis_settings(self) -> dict[str, Any]:
        """The settings that decide the analysis: neither the budget nor how it is spread."""
        later = settings_after_analysis(type(self))
        return {name: value for name, value in self.to_dict().items() if name not in later}

    @classmethod
    def rows_that_read(cls, setting: str) -> dict[str, tuple[str, ...]]:
        """The rows that read a setting, by the setting that chooses them; empty if every recipe reads it."""
        found = {choice: tuple(n for n, row in rows.items() if setting in row.reads) for choice, rows in TABLES.items()}
        return {choice: names for choice, names in found.items() if names}

    def require_budget(self) -> None:
        """Raises InputError unless a budget is given."""
        if all(getattr(self, budget) is None for budget in BUDGETS):
            raise InputError(
                "No budget: give exactly one of --ratio (say 0.2: 20 % of the linears' parameters removed), "
                "--target-params (say 100M), --target-size (say 300MB) or --target-speedup (say 1.3)."
            )

    def within(self, context: int | None) -> Recipe:
        """The recipe with its default seqlen lowered to the context of a model; a seqlen that was given stays."""
        if "seqlen" in self.model_fields_set or context is None or self.seqlen <= context:
            return self
        return self.model_copy(update={"seqlen": context})

    def single(self) -> list[Recipe]:
        """One recipe per ratio."""
        if not isinstance(self.ratio, tuple):
            return [self]
        return [self.model_copy(update={"ratio": ratio}) for ratio in self.ratio]

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types, in the order of the fields."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The settings as a recipe file."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)
