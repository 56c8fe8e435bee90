"""The protocol of a variant of a comparison: a way to make a smaller model, at any ratio or once and for all."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdllm.common.run_options import RunOptions
from svdllm.compression.recipe import Recipe

# model, ratio, folder -> folder: makes a model of ``model``, with ``ratio`` of its linears' parameters removed.
Maker = Callable[[str, float, Path], "str | Path"]


def calibrated_on(recipe: Recipe) -> str:
    """The text that a recipe calibrates on, in a sentence for the report."""
    return f"{recipe.samples} windows of {recipe.seqlen} tokens of {recipe.calibration}, seed {recipe.seed}"


@dataclass(frozen=True, kw_only=True)
class Variant(ABC):
    """One way to make a model that is compared with others; each is made at every ratio of the grid by default."""

    name: str

    @property
    def base(self) -> Variant | None:
        """The variant that this one begins with, instead of the dense model."""
        return None

    @property
    def key(self) -> str:
        """The same for variants that share an analysis; these are made one after the other at each ratio."""
        return self.name

    @property
    def calibration(self) -> str | None:
        """The text it was calibrated on, in a sentence for the report."""
        return None

    def ratios(self, asked: tuple[float, ...]) -> tuple[float | None, ...]:
        """The ratios at which it is made, of those asked for; None for a model whose size nobody chose here."""
        return asked

    def within(self, context: int | None) -> Variant:
        """The same variant, keeping to the context of a model wherever a length was not given."""
        return self

    def check(self, model: str, ratios: tuple[float, ...], options: RunOptions) -> None:
        """Raises InputError or UnsupportedModelError for what is wrong before anything is made."""
        return

    def settings(self, ratio: float | None) -> dict[str, Any]:
        """Everything that decides the model, as JSON."""
        return {"recipe": None, "recovery": None}

    def is_made(self, folder: Path, settings: dict[str, Any]) -> bool | None:
        """Whether the folder holds the finished model of these settings; None where it holds one of other settings."""
        return False

    @abstractmethod
    def make(self, model: str, ratio: float | None, folder: Path, analysis: Path, options: RunOptions) -> str | Path:
        """Makes the model in ``folder`` and returns where it is, as a folder or hub id.

        Args:
            model: the dense model, or the folder of ``base``.
            ratio: one of ``ratios``.
            folder: does not exist yet.
            analysis: a folder that variants of one ``key`` share.
        """

    def record(self, folder: str | Path) -> dict[str, Any]:
        """Describes the model in the record of a cell, beside its measurements."""
        return {"linears": [], "recovery": None, "compression_seconds": {}}

    def describe(self) -> str:
        """The settings of the variant for a reader, as YAML."""
        return f"name: {self.name}\n"


@dataclass(frozen=True, kw_only=True)
class MadeBy(Variant):
    """A model that a function makes."""

    function: Maker

    def settings(self, ratio: float | None) -> dict[str, Any]:
        made_by = f"{self.function.__module__}.{self.function.__qualname__}"
        return super().settings(ratio) | {"made by": made_by, "ratio": ratio}

    def make(self, model: str, ratio: float | None, folder: Path, analysis: Path, options: RunOptions) -> str | Path:
        assert ratio is not None
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        with options.reporter.stage("make", 1):
            return self.function(model, ratio, folder)

    def describe(self) -> str:
        return f"made by: {self.function.__module__}.{self.function.__qualname__}\n"
