"""The recipe: the complete, serialisable description of a run. It is stored in what the run makes."""

from __future__ import annotations

import re
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from svdllm.checkpoint.quantized import NVFP4_GROUP
from svdllm.common.errors import InputError
from svdllm.compression.math.metrics import METHODS

PRESETS = ("paper", "balanced", "best")
ALLOCATIONS = ("uniform", "v2", "effective-rank", "loss", "strs")
# Those that truncate linears on trial and measure what that does on the calibration text.
PROBING = ("loss", "strs")
BUDGETS = ("ratio", "target_params", "target_size", "target_speedup", "ranks")
# Settings that say how a budget counts, and go with it.
OF_A_BUDGET = ("factor_bits", "speedup_tokens")
# Settings that come after the analysis: recipes that differ in these alone share one.
AFTER_THE_ANALYSIS = frozenset(
    {
        "ratio",
        "target_params",
        "target_size",
        "factor_bits",
        "target_speedup",
        "speedup_tokens",
        "allocation",
        "strs_ratios",
        "overrides",
        "round_to",
        "elastic",
        "calibration_mode",
        "sequential_samples",
        "beta",
    }
)
# The loss reaches queries and keys only through a softmax: their gradients are small and few, and left out.
QUERY_AND_KEY = (r"\.(q|k)_proj$", r"\.(query|key)$")
# What a method without Grams of its own, or explicit ranks, cannot use and are not given by default.
PLAIN = {"metric": "input", "shrinkage": 0.0, "allocation": "uniform", "round_to": 1}

Ratio = Annotated[float, Field(gt=0, lt=1)]


class Recipe(BaseModel):
    """Settings that decide the numbers of a run; keyword-only, frozen, unknown keys are errors.

    The defaults are the preset ``balanced``; with another method than svd-llm, or explicit ranks, they are plain.
    Exactly one budget is needed to compress: ``ratio``, ``target_params``, ``target_size``, ``target_speedup`` or
    explicit ``ranks``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    method: str = Field("svd-llm", description="Row of the table of methods: svd-llm, svd, asvd or fwsvd.")
    asvd_alpha: float = Field(0.5, ge=0, le=1, description="Exponent of ASVD's channel scales.")
    metric: Literal["input", "two-sided"] = Field(
        "two-sided", description="Error of the outputs as it is, or weighted by what the loss says of each (gradients)."
    )
    gradient_samples: int = Field(32, ge=1, description="Calibration windows of the backward pass (two-sided, fwsvd).")
    input_only: tuple[str, ...] = Field(
        QUERY_AND_KEY, description="Regular expressions of linears whose metric stays that of their inputs (two-sided)."
    )
    shrinkage: float = Field(0.1, ge=0, le=1, description="Share of the Gram's diagonal mixed into the Gram.")
    gradient_shrinkage: float = Field(
        0.3, gt=0, le=1, description="Share of the mean diagonal mixed into the gradients' Gram (two-sided)."
    )

    ratio: Ratio | tuple[Ratio, ...] | None = Field(
        None, description="Share of the parameters of the compressed linears that is removed (the paper's ratio)."
    )
    target_params: int | None = Field(None, gt=0, description="Parameters of the whole compressed model.")
    target_size: int | None = Field(None, gt=0, description="Bytes of the weight files of the whole compressed model.")
    factor_bits: Literal[8, 4] | None = Field(
        None,
        description="Bits in which target_size counts the linears: the size is that of what `svdllm quantize` makes of the "
        "compressed model.",
    )
    target_speedup: float | None = Field(
        None,
        gt=1,
        allow_inf_nan=False,
        description="How many times as fast all linears together shall be, by times measured on the device of the run.",
    )
    speedup_tokens: int = Field(
        1, ge=1, description="Tokens at once that target_speedup is for: 1 is decoding, 1024 a prompt."
    )
    ranks: dict[str, int | Literal["full", "dense"]] | None = Field(
        None,
        description="Explicit ranks by regular expression, the first match wins; other linears stay dense. 'full' "
        "keeps full rank.",
    )
    allocation: Literal["uniform", "v2", "effective-rank", "loss", "strs"] = Field(
        "loss", description="How the budget is spread over the linears."
    )
    probe_share: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Most of the work of calibration and probing together that probing may be (loss, strs).",
    )
    strs_ratios: tuple[Ratio, ...] = Field(
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        min_length=1,
        description="Ratios that each linear is tried at, alone (strs).",
    )
    ignore: tuple[str, ...] = Field((), description="Regular expressions of linears that stay dense.")
    overrides: dict[str, Annotated[float, Field(ge=0, lt=1)]] = Field(
        default_factory=dict, description="Ratio by regular expression; the first match wins; 0 leaves it dense."
    )
    round_to: int = Field(8, ge=1, description="Ranks are multiples of this.")

    elastic: bool = Field(
        False, description="Also write what every smaller size needs, so that `svdllm slice` makes it without data."
    )

    calibration: str = Field("wikitext2", description="Calibration text: a name, a file, a hub data set or a mixture.")
    samples: int = Field(256, ge=1, description="Calibration windows.")
    seqlen: int = Field(2048, ge=2, description="Tokens of a calibration window.")
    calibration_mode: Literal["dense", "sequential"] = Field(
        "dense", description="Inputs from the dense model, or from the model as far as it is compressed already."
    )
    beta: float | None = Field(
        None, ge=0, le=1, description="How far outputs are pulled to the dense model's (sequential); null chooses."
    )
    sequential_samples: int = Field(32, ge=1, description="Calibration windows of the second walk (sequential).")
    bias_correction: bool = Field(
        False, description="Factor centred inputs and give every low-rank linear the bias that this leaves over."
    )
    joint_kv: bool = Field(
        False,
        description="One first factor for k_proj and v_proj of a layer: a latent cache then keeps one latent for both.",
    )
    seed: int = Field(3, ge=0, description="Seed of the random windows.")

    device: str = Field("auto", description="Where the blocks run: auto, cpu, cuda, cuda:1, ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field(
        "auto", description="What the blocks compute in; the checkpoint keeps the source's dtype."
    )
    batch_tokens: int = Field(4096, ge=1, description="Tokens that run through a block at once.")

    @model_validator(mode="before")
    @classmethod
    def _plain_defaults(cls, settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        plain: dict[str, Any] = {}
        if settings.get("method", "svd-llm") != "svd-llm":
            plain = PLAIN
        elif settings.get("ranks") is not None:
            plain = {"allocation": "uniform", "round_to": 1}
        if settings.get("factor_bits") == 4:
            plain = plain | {"round_to": NVFP4_GROUP}
        return plain | settings

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(f"unknown method {value!r}; known are {', '.join(METHODS)}")
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
    def _one_budget(self) -> Recipe:
        budgets = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(budgets) > 1:
            raise ValueError(f"{' and '.join(budgets)} are given together; give exactly one budget")
        if self.ranks is not None and (self.overrides or self.round_to > 1):
            raise ValueError("overrides and round_to do nothing to explicit ranks; write the ranks you want")
        if isinstance(self.ratio, tuple) and not self.ratio:
            raise ValueError("ratio is an empty list; give at least one")
        if isinstance(self.ratio, tuple) and len(set(self.ratio)) < len(self.ratio):
            raise ValueError(f"ratio names a value twice: {self.ratio}")
        if len(set(self.strs_ratios)) < len(self.strs_ratios):
            raise ValueError(f"strs_ratios names a value twice: {self.strs_ratios}")
        return self

    @model_validator(mode="after")
    def _sensible_combination(self) -> Recipe:
        """Combinations that make no sense are refused, not ignored."""
        if self.metric == "two-sided" and self.method != "svd-llm":
            raise ValueError(
                f"metric two-sided weighs the Gram of the inputs by gradients; method {self.method} has no Gram, "
                "use method svd-llm"
            )
        if self.shrinkage and self.method != "svd-llm":
            raise ValueError(f"shrinkage acts on a Gram; method {self.method} has none, use method svd-llm")
        if self.bias_correction and self.method != "svd-llm":
            raise ValueError(f"bias_correction needs the mean inputs of a Gram; method {self.method} has none")
        if self.calibration_mode == "sequential" and self.method != "svd-llm":
            raise ValueError(
                f"calibration_mode sequential fits to Grams of the compressed stream; method {self.method} uses none"
            )
        if (
            self.calibration_mode == "sequential"
            and self.beta is None
            and min(self.samples, self.sequential_samples) < 2
        ):
            raise ValueError(
                "calibration_mode sequential holds windows out to choose beta by; give at least 2 samples and "
                "sequential_samples, or a beta"
            )
        if self.beta is not None and self.calibration_mode == "dense":
            raise ValueError("beta does nothing to a dense calibration; use calibration_mode sequential")
        if self.allocation != "uniform" and self.ranks is not None:
            raise ValueError(f"allocation {self.allocation} chooses ranks, and ranks are given; drop one of them")
        if self.allocation == "v2" and (self.target_params or self.target_size):
            raise ValueError("allocation v2 spreads a ratio over the linears of a kind; give a ratio")
        if self.target_speedup is not None and self.allocation != "loss":
            raise ValueError(
                f"target_speedup is a budget of measured time, which allocation {self.allocation} does not count; use "
                "allocation loss"
            )
        if self.factor_bits is not None and self.target_size is None:
            raise ValueError("factor_bits does nothing without target_size, which it says how to count")
        if self.factor_bits == 4 and self.round_to % NVFP4_GROUP:
            raise ValueError(
                f"factor_bits 4 shares a scale among {NVFP4_GROUP} inputs, and a factor of another rank gets 8 bits; use "
                f"round_to {NVFP4_GROUP} or a multiple of it"
            )
        if self.speedup_tokens > 1 and self.target_speedup is None:
            raise ValueError("speedup_tokens does nothing without target_speedup")
        return self

    @model_validator(mode="after")
    def _elastic_is_nested(self) -> Recipe:
        if self.elastic and (reason := self._why_not_nested()):
            raise ValueError(f"elastic writes one checkpoint from which every smaller ratio is sliced, but {reason}")
        return self

    def _why_not_nested(self) -> str | None:
        """Why a run at another ratio would not give the first columns and rows of these factors; None where it would."""
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
    def needs_gradients(self) -> bool:
        """Whether the loss is followed back through the model."""
        return self.metric == "two-sided" or METHODS[self.method].left is not None

    @property
    def needs_probes(self) -> bool:
        """Whether linears are truncated on trial, to see what it does."""
        return self.allocation in PROBING

    @property
    def needs_tokens(self) -> bool:
        """Whether a calibration text is read."""
        return METHODS[self.method].needs_tokens or self.needs_probes

    def require_budget(self) -> None:
        """Raises InputError unless a budget is given."""
        if all(getattr(self, budget) is None for budget in BUDGETS):
            raise InputError(
                "No budget: give exactly one of --ratio (say 0.2: 20 % of the linears' parameters removed), "
                "--target-params (say 100M), --target-size (say 300MB) or --target-speedup (say 1.3)."
            )

    def within(self, context: int | None) -> Recipe:
        """The same, with a seqlen that nobody asked for lowered to the context of a model."""
        if "seqlen" in self.model_fields_set or context is None or self.seqlen <= context:
            return self
        return self.model_copy(update={"seqlen": context})

    @property
    def analysis_settings(self) -> dict[str, Any]:
        """The settings that decide the analysis: not the budget, nor how it is spread."""
        return {name: value for name, value in self.to_dict().items() if name not in AFTER_THE_ANALYSIS}

    def single(self) -> list[Recipe]:
        """One recipe per ratio."""
        if not isinstance(self.ratio, tuple):
            return [self]
        return [self.model_copy(update={"ratio": ratio}) for ratio in self.ratio]

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def make_recipe(settings: dict[str, Any], origin: str = "the settings") -> Recipe:
    """Validates a mapping into a recipe; every problem is reported at once as an InputError."""
    try:
        return Recipe(**settings)
    except ValidationError as error:
        raise InputError(f"{origin}: {problems_of(error)}") from error


def load_settings(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) recipe file.

    Raises:
        InputError: no such file, or not a mapping.
    """
    path = Path(path)
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"Recipe {path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise InputError(f"Recipe {path}: expected a mapping of settings, found {type(settings).__name__}.")
    return settings


def allocation_file(path: str | Path) -> dict[str, int | str]:
    """Explicit ranks from a JSON or YAML file: linear (a regular expression) -> rank, ``full`` or ``dense``.

    Raises:
        InputError: no allocation has this name and no file either, or the file is no such map.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"--allocation {str(path)!r} is neither one of {', '.join(ALLOCATIONS)} nor a file. A file is a JSON or YAML "
            "map from linear to rank, like {'mlp.down_proj': 200, 'q_proj': dense}."
        )
    ranks = load_settings(path)
    wrong = [
        f"{name}: {rank!r}" for name, rank in ranks.items() if rank not in ("full", "dense") and not _is_rank(rank)
    ]
    if wrong or not ranks:
        raise InputError(
            f"Allocation {path}: expected a map from linear to a rank above zero, 'full' or 'dense', found "
            f"{'; '.join(wrong[:5]) or 'nothing'}."
        )
    return {str(name): rank for name, rank in ranks.items()}


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def preset_settings(name: str) -> dict[str, Any]:
    """The settings of a preset, from the YAML file in the package."""
    if name not in PRESETS:
        raise InputError(f"Unknown preset {name!r}; known are {', '.join(PRESETS)}.")
    text = (resources.files("svdllm.compression") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def parse_amount(text: str, *, what: str, bytes_allowed: bool) -> int:
    """``100M`` or ``1.5B`` parameters, ``300MB`` or ``2GiB`` bytes, as an integer."""
    units = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
    if bytes_allowed:
        units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
        units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    amount = 0 if match is None else int(Decimal(match[1]) * units.get(match[2].upper(), 0))
    if amount <= 0:
        examples = "300MB, 1.5GB or 2GiB" if bytes_allowed else "100M or 1.5B"
        raise InputError(f"{what} {text!r} is not an amount above zero; write it like {examples}.")
    return amount


def problems_of(error: ValidationError) -> str:
    lines = []
    problems = error.errors()
    for problem in problems:
        place = problem["loc"]
        if any(len(other["loc"]) > len(place) and other["loc"][: len(place)] == place for other in problems):
            continue  # a list is also called too short where it has items that are wrong
        where = ".".join(str(part) for part in place if not str(part).startswith(("constrained", "tuple", "float")))
        message = problem["msg"].removeprefix("Value error, ")
        found = problem.get("input")
        shown = f" (found {found!r})" if isinstance(found, str | int | float) else ""
        line = f"{where or 'recipe'}: {message}{shown}"
        if line not in lines:
            lines.append(line)
    return "; ".join(lines)
