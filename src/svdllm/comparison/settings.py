"""What a grid is: variants, ratios, and how each model of them is measured."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from svdllm.compression.recipe import Recipe
from svdllm.recovery import Recovery

DENSE = "dense"
# For the generations of the report: knowledge, a story, instructions, arithmetic, code.
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
class Variant:
    """One way to compress, at any ratio, and perhaps to train afterwards. The recipe has no budget."""

    name: str
    recipe: Recipe
    recovery: Recovery | None = None

    @property
    def untrained(self) -> Variant:
        return replace(self, name=self.name.split("+")[0], recovery=None)

    @property
    def analysis_key(self) -> str:
        """The same for variants that share calibration and decomposition."""
        return hashlib.sha256(json.dumps(self.recipe.analysis_settings(), sort_keys=True).encode()).hexdigest()[:16]

    def within(self, context: int | None) -> Variant:
        """The same, whose calibration keeps to the context of a model where nobody said how long its windows are."""
        return replace(self, recipe=self.recipe.within(context))

    def at(self, ratio: float) -> Recipe:
        return self.recipe.model_copy(update={"ratio": ratio})


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
    """One model of a grid; the dense one has neither variant nor ratio."""

    variant: Variant | None = None
    ratio: float | None = None

    @property
    def name(self) -> str:
        return DENSE if self.variant is None else f"{self.variant.name} {self.ratio:.4g}"

    @property
    def is_trained(self) -> bool:
        return self.variant is not None and self.variant.recovery is not None

    @property
    def untrained(self) -> Cell:
        """What training begins with."""
        return self if self.variant is None else replace(self, variant=self.variant.untrained)

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
        return [Cell(), *(Cell(variant=v, ratio=ratio) for v in self.variants for ratio in self.ratios)]

    def settings_of(self, cell: Cell) -> dict[str, Any]:
        """All that decides what a cell holds."""
        variant = cell.variant
        return {
            "model": self.model,
            "revision": self.revision,
            "measures": self.measures.to_dict(),
            "recipe": None if variant is None or cell.ratio is None else variant.at(cell.ratio).to_dict(),
            "recovery": None
            if variant is None or variant.recovery is None
            else variant.recovery.model_dump(mode="json"),
        }
