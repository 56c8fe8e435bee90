"""The settings of a comparison: variants, ratios, and how every model is measured."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from svdllm.common.progress import Reporter
from svdllm.common.run_options import RunOptions
from svdllm.comparison.variant import Variant

DENSE = "dense"
# The prompts of the report: knowledge, a story, instructions, arithmetic, code.
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village at the foot of a mountain,",
    "To bake a simple loaf of bread, you need",
    "The difference between weather and climate is that",
    "If a train travels 60 kilometres in 40 minutes, its speed is",
    "def fibonacci(n):",
)


def file_name_of(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+=-]+", "-", name)


@dataclass(frozen=True, kw_only=True)
class Measures:
    """How every model of a grid is measured.

    Args:
        texts: for perplexity, on the first ``windows`` windows of ``seqlen`` tokens.
        tasks: of lm-evaluation-harness, on their first ``limit`` examples.
        task_data: a folder with their files, instead of the hub.
        prompts: continued by ``new_tokens`` tokens, greedily.
    """

    texts: tuple[str, ...] = ()
    seqlen: int = 2048
    windows: int | None = None
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    num_fewshot: int | None = None
    task_data: Path | None = None
    prompts: tuple[str, ...] = PROMPTS
    new_tokens: int = 48
    device: str = "auto"
    dtype: str = "auto"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"task_data": None if self.task_data is None else str(self.task_data)}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model of a grid. The dense one has no variant; a model made elsewhere has no ratio."""

    variant: Variant | None = None
    ratio: float | None = None

    @property
    def name(self) -> str:
        variant = DENSE if self.variant is None else self.variant.name
        return variant if self.ratio is None else f"{variant} {self.ratio:.4g}"

    @property
    def base(self) -> Cell | None:
        """The cell of the model that this one begins with, where that is not the dense one."""
        base = None if self.variant is None else self.variant.base
        return None if base is None else replace(self, variant=base)

    @property
    def file_name(self) -> str:
        return file_name_of(self.name)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Every variant at every ratio, beside the dense model."""

    model: str
    variants: tuple[Variant, ...]
    ratios: tuple[float, ...]
    measures: Measures
    title: str
    revision: str | None = None
    offline: bool = False

    def within(self, context: int | None) -> Grid:
        return replace(self, variants=tuple(variant.within(context) for variant in self.variants))

    @property
    def cells(self) -> list[Cell]:
        made = [Cell(variant=v, ratio=ratio) for v in self.variants for ratio in v.ratios(self.ratios)]
        return [Cell(), *made]

    def options(self, reporter: Reporter) -> RunOptions:
        return RunOptions(offline=self.offline, revision=self.revision, reporter=reporter)

    def settings_of(self, cell: Cell) -> dict[str, Any]:
        """Everything that decides what a cell holds."""
        settings = {"model": self.model, "revision": self.revision, "measures": self.measures.to_dict()}
        if cell.variant is None:
            return settings | {"recipe": None, "recovery": None}
        return settings | cell.variant.settings(cell.ratio)
