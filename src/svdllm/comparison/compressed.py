"""Variants that this library makes: compressed by a recipe or pruned, and trained afterwards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from svdllm.checkpoint.report import is_checkpoint, read_report
from svdllm.common.errors import InputError, ResourceError
from svdllm.common.run_options import RunOptions
from svdllm.comparison.variant import Variant, calibrated_on
from svdllm.compression.plan import plan
from svdllm.compression.recipe import Recipe
from svdllm.compression.recipe_files import make_recipe
from svdllm.compression.run import compress
from svdllm.data import check_source
from svdllm.pruning.methods import recipe_of
from svdllm.pruning.run import prune
from svdllm.pruning.settings import Pruning
from svdllm.recovery import Recovery, make_recovery, recover
from svdllm.recovery.checks import check_data
from svdllm.recovery.distributed import own_device
from svdllm.recovery.methods import METHODS

COPIED = ("achieved_ratio", "dense_params", "file_bytes", "dense_file_bytes")  # from a report to a record
GO_ON = "When there is more memory, the same command goes on with what is finished."
LESS_COMPRESSING = (
    f"{GO_ON} A recipe file with a lower batch_tokens or probe_share needs less: name it among the methods."
)
LESS_PRUNING = f"{GO_ON} Fewer --samples or a lower --seqlen need less: give them with another folder."
LESS_TRAINING = (
    f"{GO_ON} A lower micro_batch or seqlen, or gradient_checkpointing, needs less: give it in --recover, and another "
    "folder."
)


@dataclass(frozen=True, kw_only=True)
class Compressed(Variant):
    """A model compressed by a recipe, which has no budget of its own."""

    recipe: Recipe

    @property
    def key(self) -> str:
        settings = json.dumps(self.recipe.analysis_settings(), sort_keys=True)
        return hashlib.sha256(settings.encode()).hexdigest()[:16]

    @property
    def device(self) -> str:
        return self.recipe.device

    @property
    def calibration(self) -> str | None:
        return calibrated_on(self.recipe) if self.recipe.needs_tokens else None

    def within(self, context: int | None) -> Compressed:
        return replace(self, recipe=self.recipe.within(context))

    def at(self, ratio: float) -> Recipe:
        return self.recipe.model_copy(update={"ratio": ratio})

    def check(self, model: str, ratios: tuple[float, ...], options: RunOptions) -> None:
        sizes = self.recipe.model_copy(update={"ratio": ratios})
        plan(model, sizes, offline=options.offline, revision=options.revision)
        if self.recipe.needs_tokens:
            check_source(self.recipe.calibration)

    def settings(self, ratio: float | None) -> dict[str, Any]:
        return super().settings(ratio) | {"recipe": None if ratio is None else self.at(ratio).to_dict()}

    def is_made(self, folder: Path, settings: dict[str, Any]) -> bool | None:
        if not is_checkpoint(folder):
            return False
        made = with_new_fields(read_report(folder)["recipe"])
        return (made == settings["recipe"] and _is_trained(folder, settings)) or None

    def make(self, model: str, ratio: float | None, folder: Path, analysis: Path, options: RunOptions) -> Path:
        """Runs Algorithm 1; every other ratio and allocation of the recipe finds its analysis done."""
        assert ratio is not None
        with _advising(LESS_COMPRESSING):
            compress(
                model,
                self.at(ratio),
                folder,
                offline=options.offline,
                revision=options.revision,
                analysis_dir=analysis,
                reporter=options.reporter,
            )
        return folder

    def record(self, folder: str | Path) -> dict[str, Any]:
        report = read_report(Path(folder))
        record = {key: report[key] for key in (*COPIED, "linears")}
        record |= {"compression_seconds": report["seconds"], "allocation": report["allocation"]}
        return record | {"recovery": report.get("recovery")}

    def describe(self) -> str:
        return self.recipe.to_yaml()


@dataclass(frozen=True, kw_only=True)
class Pruned(Variant):
    """A model made smaller by a published method of pruning, at the same ratios and on the same text.

    What a method cannot do with a model is said by its cells, so that those of other methods are made.
    """

    pruning: Pruning

    @property
    def device(self) -> str:
        return self.pruning.device

    @property
    def calibration(self) -> str:
        return calibrated_on(recipe_of(self.pruning))

    def within(self, context: int | None) -> Pruned:
        seqlen = recipe_of(self.pruning).within(context).seqlen
        return replace(self, pruning=self.pruning.model_copy(update={"seqlen": seqlen}))

    def at(self, ratio: float) -> Pruning:
        return self.pruning.model_copy(update={"ratio": ratio})

    def check(self, model: str, ratios: tuple[float, ...], options: RunOptions) -> None:
        check_source(self.pruning.calibration)

    def settings(self, ratio: float | None) -> dict[str, Any]:
        return super().settings(ratio) | {"pruning": None if ratio is None else self.at(ratio).to_dict()}

    def is_made(self, folder: Path, settings: dict[str, Any]) -> bool | None:
        if not is_checkpoint(folder):
            return False
        made = read_report(folder)["recipe"]
        return (made == settings["pruning"] and _is_trained(folder, settings)) or None

    def make(self, model: str, ratio: float | None, folder: Path, analysis: Path, options: RunOptions) -> Path:
        assert ratio is not None
        with _advising(LESS_PRUNING):
            prune(
                model,
                self.at(ratio),
                folder,
                offline=options.offline,
                revision=options.revision,
                reporter=options.reporter,
            )
        return folder

    def record(self, folder: str | Path) -> dict[str, Any]:
        report = read_report(Path(folder))
        record = super().record(folder) | {"compression_seconds": report["seconds"]}
        return record | {key: report[key] for key in COPIED} | {"recovery": report.get("recovery")}

    def describe(self) -> str:
        return self.pruning.to_yaml()


@dataclass(frozen=True, kw_only=True)
class Trained(Variant):
    """A compressed or pruned model, trained afterwards."""

    compressed: Compressed | Pruned
    recovery: Recovery

    @property
    def base(self) -> Compressed | Pruned:
        return self.compressed

    @property
    def key(self) -> str:
        return self.compressed.key

    @property
    def calibration(self) -> str | None:
        return self.compressed.calibration

    def within(self, context: int | None) -> Trained:
        return replace(self, compressed=self.compressed.within(context))

    def check(self, model: str, ratios: tuple[float, ...], options: RunOptions) -> None:
        self.compressed.check(model, ratios, options)
        own_device(self.recovery.device)
        check_data(self.recovery, ())
        for method in self.recovery.methods:
            METHODS[method].check_extra(f"method {self.name}")
        if options.revision is not None and self.recovery.teacher == model:
            raise InputError(
                f"--revision does not reach the training of {self.name}, whose teacher would be another model. "
                "Download the revision and give its folder."
            )

    def settings(self, ratio: float | None) -> dict[str, Any]:
        return self.compressed.settings(ratio) | {"recovery": self.recovery.model_dump(mode="json")}

    def is_made(self, folder: Path, settings: dict[str, Any]) -> bool | None:
        return self.compressed.is_made(folder, settings)

    def make(self, model: str, ratio: float | None, folder: Path, analysis: Path, options: RunOptions) -> Path:
        with _advising(LESS_TRAINING):
            recover(model, folder, self.recovery, offline=options.offline, reporter=options.reporter)
        return folder

    def record(self, folder: str | Path) -> dict[str, Any]:
        return self.compressed.record(folder)

    def describe(self) -> str:
        recovery = json.dumps(self.recovery.model_dump(mode="json"))
        return f"{self.compressed.describe()}recovery: {recovery}\n"


def _is_trained(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a checkpoint was trained as the settings say."""
    trained = [with_new_recovery(entry["settings"]) for entry in read_report(folder).get("recovery", [])]
    return trained == ([] if settings["recovery"] is None else [settings["recovery"]])


def with_new_fields(recipe: dict[str, Any] | None) -> dict[str, Any] | None:
    """A stored recipe, with the fields that recipes did not have when it was stored at their defaults."""
    return None if recipe is None else make_recipe(recipe, "a stored recipe").to_dict()


def with_new_recovery(settings: dict[str, Any] | None) -> dict[str, Any] | None:
    """Stored settings of a recovery, with the fields that there were not when they were stored at their defaults."""
    return None if settings is None else make_recovery(settings).model_dump(mode="json")


@contextmanager
def _advising(advice: str) -> Iterator[None]:
    """Replaces the advice of an error about memory by what can be done in a comparison."""
    try:
        yield
    except ResourceError as error:
        if not error.advice:
            raise
        raise ResourceError(error.problem, advice) from error
