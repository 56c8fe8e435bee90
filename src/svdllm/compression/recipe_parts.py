"""Parts of the recipe: the choice of rows from the tables, and the budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator
from typing_extensions import Self

from svdllm.common.settings import setting
from svdllm.compression.after_analysis import AfterAnalysis
from svdllm.compression.forms import FORMS
from svdllm.compression.math.metrics import METHODS, METRICS
from svdllm.compression.ranks import ALLOCATIONS

BUDGETS = ("ratio", "target_params", "target_size", "target_speedup", "ranks")
# Settings that say how a budget counts. A new budget replaces them too.
OF_A_BUDGET = ("factor_bits", "speedup_tokens")

Ratio = Annotated[float, Field(gt=0, lt=1)]


def rows_of(table: Mapping[str, Any]) -> str:
    """The rows of a table, for a description."""
    return ", ".join(f"{name} ({row.summary})" for name, row in table.items())


class MethodChoice(BaseModel):
    """The row of ``METHODS``."""

    method: str = setting(
        "svd-llm",
        f"How a linear is truncated: {rows_of(METHODS)}.",
        panel="Method",
        metavar="|".join(METHODS),
    )


class MetricChoice(BaseModel):
    """The row of ``METRICS``."""

    metric: str = setting(
        "two-sided",
        f"Which error of the outputs is minimised: {rows_of(METRICS)}.",
        panel="Method",
        metavar="|".join(METRICS),
    )


class Budget(BaseModel):
    """How small the model becomes, and the row of ``ALLOCATIONS``, which spreads the budget."""

    ratio: AfterAnalysis[Ratio | tuple[Ratio, ...] | None] = setting(
        None,
        "Share of the parameters of the compressed linears that is removed: 0.2 keeps 80 %. Several, as in "
        "0.2,0.4,0.6, share one calibration.",
        panel="Budget (exactly one)",
        reader="ratios",
    )
    target_params: AfterAnalysis[int | None] = setting(
        None,
        "Parameters of the whole compressed model, as in 100M.",
        panel="Budget (exactly one)",
        reader="parameters",
        gt=0,
    )
    target_size: AfterAnalysis[int | None] = setting(
        None,
        "Bytes of the weight files of the whole compressed model, as in 300MB.",
        panel="Budget (exactly one)",
        reader="bytes",
        gt=0,
    )
    factor_bits: AfterAnalysis[Literal[8, 4] | None] = setting(
        None,
        "8 or 4: target_size is the size after `svdllm quantize --format torchao` with as many bits. With 4, ranks are "
        "multiples of 16.",
        panel="Budget (exactly one)",
        shown_default="the size as written",
    )
    target_speedup: AfterAnalysis[float | None] = setting(
        None,
        "How many times as fast all linears together shall be, as in 1.3, by times measured on the device of the run. "
        "The head and linears that stay dense count; attention, norms and Python do not.",
        panel="Budget (exactly one)",
        gt=1,
        allow_inf_nan=False,
    )
    speedup_tokens: AfterAnalysis[int] = setting(
        1,
        "Tokens at once that target_speedup is for: 1 is decoding of one text, 1024 a prompt.",
        panel="Budget (exactly one)",
        ge=1,
    )
    ranks: dict[str, int | Literal["full", "dense"] | dict[str, int]] | None = setting(
        None,
        "Explicit forms by regular expression; the first match wins, other linears stay dense. A number is the rank of "
        "a pair, 'full' keeps full rank, {packed: 96} or {narrow: 1024} names a form.",
        panel="Allocation",
        flag="--allocation",
    )
    allocation: AfterAnalysis[str] = setting(
        "loss",
        f"How the budget is spread over the linears: {rows_of(ALLOCATIONS)}. Or a JSON or YAML file of explicit forms: "
        "linear (a regular expression): rank, full, dense or {form: size}.",
        panel="Allocation",
        metavar="NAME|FILE",
        reader="allocation",
    )

    @field_validator("ranks")
    @classmethod
    def _known_forms(cls, value: Any) -> Any:
        for pattern, wanted in (value or {}).items():
            if isinstance(wanted, dict) and (len(wanted) != 1 or not set(wanted) < set(FORMS)):
                known = ", ".join(FORMS)
                raise ValueError(
                    f"{pattern!r}: expected a form of {known} with its size, as in {{packed: 96}}: {wanted}"
                )
        return value

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        budgets = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(budgets) > 1:
            raise ValueError(f"{' and '.join(budgets)} are given together; give exactly one budget")
        if isinstance(self.ratio, tuple) and not self.ratio:
            raise ValueError("ratio is an empty list; give at least one")
        if isinstance(self.ratio, tuple) and len(set(self.ratio)) < len(self.ratio):
            raise ValueError(f"ratio names a value twice: {self.ratio}")
        if self.factor_bits is not None and self.target_size is None:
            raise ValueError("factor_bits does nothing without target_size, which it says how to count")
        if self.speedup_tokens > 1 and self.target_speedup is None:
            raise ValueError("speedup_tokens does nothing without target_speedup")
        return self
