"""A grid from beginning to end: calibrate once for all ratios, measure every cell, go on where an earlier run stopped."""

from __future__ import annotations

import json
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from svdllm.checkpoint.output import LOCK, followed, is_empty, require_writable
from svdllm.checkpoint.report import is_checkpoint, read_report
from svdllm.common.disk import explain_full_disk
from svdllm.common.errors import InputError, ResourceError, as_ours, first_line
from svdllm.common.extras import require_extra
from svdllm.common.files import write_atomically
from svdllm.common.locks import locked
from svdllm.common.progress import Reporter, SubReporter
from svdllm.common.settings_file import differences
from svdllm.comparison.fingerprint import identity_of
from svdllm.comparison.measure import measure
from svdllm.comparison.settings import Cell, Grid, Variant, file_name_of
from svdllm.comparison.spectra import read_spectra
from svdllm.compression.plan import plan
from svdllm.compression.recipe_files import make_recipe
from svdllm.compression.run import compress
from svdllm.data import check_source
from svdllm.evaluation.tasks import TaskSuite, check_models, open_tasks
from svdllm.models.limits import context_length, require_context
from svdllm.models.open import open_config
from svdllm.recovery import recover
from svdllm.recovery.checks import check_data
from svdllm.recovery.distributed import own_device

Record = dict[str, Any]
GRID_FILE = "grid.json"
GOES_ON = "The same command goes on with what is finished."
GO_ON = "When there is more memory, the same command goes on with what is finished."
LESS_COMPRESSING = (
    f"{GO_ON} A recipe file with a lower batch_tokens or probe_share needs less: name it among the methods."
)
LESS_TRAINING = f"{GO_ON} A lower micro_batch or seqlen, or gradient_checkpointing, needs less: give it in --recover, and another folder."


def run_grid(
    grid: Grid,
    folder: str | Path,
    *,
    keep: bool = False,
    reporter: Reporter | None = None,
    on_cell: Callable[[list[Record]], object] | None = None,
) -> list[Record]:
    """Makes and measures every cell; returns their records, in the grid's order.

    A cell that fails is a record that says why; the others go on. Finished cells are files in ``folder/cells``: the same
    grid goes on with them, and so does one with more variants or ratios. Failed ones are tried again.

    Args:
        folder: made by this call, or left by an earlier one.
        keep: leave every checkpoint in ``folder/checkpoints``; otherwise it is removed when it is measured.
        on_cell: is called with all records so far after each new one.

    Raises:
        InputError, UnsupportedModelError: something is wrong with the grid as a whole; before any work.
    """
    reporter = reporter or Reporter()
    context = context_length(open_config(grid.model, offline=grid.offline, revision=grid.revision).config)
    grid = grid.within(context)
    run = _Run(grid=grid, folder=followed(Path(folder)), keep=keep, reporter=reporter)
    run.check()
    with locked(run.folder / LOCK, run.folder) as warning, explain_full_disk(run.folder, GOES_ON):
        if warning is not None:
            reporter.warn(warning)
        return _run_alone(replace(run, identity=identity_of(grid)), on_cell)


def _run_alone(run: _Run, on_cell: Callable[[list[Record]], object] | None) -> list[Record]:
    """Runs what is left to do in a folder that no other run writes to."""
    run.refuse_other_settings()
    grid = run.grid
    with _tasks(grid, run.reporter) as suite:
        for name in ("cells", "spectra"):
            (run.folder / name).mkdir(parents=True, exist_ok=True)
        about = json.dumps({"title": grid.title, "model": grid.model}, indent=2)
        write_atomically(run.folder / GRID_FILE, about.encode())
        for _ in replace(run, suite=suite).execute():
            if on_cell is not None:
                on_cell(run.records())
    records = run.records()
    if all(record["status"] == "done" for record in records):
        shutil.rmtree(run.work, ignore_errors=True)
    return records


@dataclass(frozen=True, kw_only=True)
class _Run:
    grid: Grid
    folder: Path
    keep: bool
    reporter: Reporter
    identity: Record = field(default_factory=dict)
    suite: TaskSuite | None = None

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def records(self) -> list[Record]:
        return [record for cell in self.grid.cells if (record := self._read(cell)) is not None]

    def check(self) -> None:
        """What can be wrong with any cell, before the first one is made."""
        grid = self.grid
        require_extra("matplotlib", "a report", extra="report")
        require_writable(self.folder)
        if self.folder.is_dir() and not is_empty(self.folder, LOCK) and not (self.folder / GRID_FILE).is_file():
            raise InputError(
                f"{self.folder} exists, is not empty, and is no report of an earlier run: name another folder."
            )
        names = [cell.file_name for cell in grid.cells]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"Two models of the grid are called {twice[0]}: give each method and value once.")
        for text in grid.measures.texts:
            check_source(text)
        if grid.measures.texts:
            source = open_config(grid.model, offline=grid.offline, revision=grid.revision)
            require_context(source.config, grid.measures.seqlen, "--ppl-seqlen")
        for variant in grid.variants:
            sizes = variant.recipe.model_copy(update={"ratio": grid.ratios})
            plan(grid.model, sizes, offline=grid.offline, revision=grid.revision)
            if variant.recipe.needs_tokens:
                check_source(variant.recipe.calibration)
            if variant.recovery is not None:
                own_device(variant.recovery.device)
                check_data(variant.recovery, ())
                if "sequential-lora" in variant.recovery.methods:
                    require_extra("peft", f"method {variant.name}", extra="recover")
                if grid.revision is not None and variant.recovery.teacher == grid.model:
                    raise InputError(
                        f"--revision is not known to the training of {variant.name}, whose teacher would be another model: "
                        "download the revision and give its folder."
                    )

    def refuse_other_settings(self) -> None:
        """Of finished cells and kept checkpoints."""
        for cell in self.grid.cells:
            if (found := self._read(cell)) is not None and found["status"] == "done":
                self._refuse_other(found["settings"], cell)
                if self.keep and cell.variant is not None and found["checkpoint"] is None:
                    self.reporter.warn(f"{cell.name} was measured before and not kept: --keep is too late for it.")
            if self.keep and cell.variant is not None:
                for made in (cell, cell.untrained):
                    self._refuse_other_checkpoint(made)

    def _refuse_other(self, found: Record, cell: Cell) -> None:
        # Records of older versions say less.
        wanted = {key: value for key, value in self._settings_of(cell).items() if key in found}
        found = found | {"recipe": _with_new_fields(found["recipe"])}
        if different := differences(_flat(found), _flat(wanted)):
            raise InputError(
                f"{self._file(cell)} holds '{cell.name}' made with other settings: {different}. Give the same settings to "
                "go on, or name another folder."
            )

    def _refuse_other_checkpoint(self, cell: Cell) -> None:
        folder = self._checkpoint(cell)
        if is_checkpoint(folder) and not self._is_of(folder, cell):
            raise InputError(
                f"{folder} was made with other settings than those of '{cell.name}'. Give the same settings to go on, or name "
                "another folder."
            )

    def _is_of(self, folder: Path, cell: Cell) -> bool:
        """Whether a checkpoint was made by the recipe of a cell, and trained as it shall be."""
        report, wanted = read_report(folder), self._settings_of(cell)
        trained = [entry["settings"] for entry in report.get("recovery", [])]
        return _with_new_fields(report["recipe"]) == wanted["recipe"] and trained == (
            [wanted["recovery"]] if cell.is_trained else []
        )

    def _is_made(self, cell: Cell) -> bool:
        """Whether the checkpoint of a cell is there; one that an earlier run left with other settings is removed."""
        folder = self._checkpoint(cell)
        if is_checkpoint(folder) and not self._is_of(folder, cell):
            shutil.rmtree(folder)
        return is_checkpoint(folder)

    def execute(self) -> Iterator[Cell]:
        """Yields every cell when its record is written: the dense model, then recipe by recipe and ratio by ratio."""
        cells = [cell for cell in self.grid.cells if not self._is_done(cell)]
        for cell in cells:
            if cell.variant is None:
                yield self._attempt(cell)
        keys = dict.fromkeys(cell.variant.analysis_key for cell in cells if cell.variant is not None)
        for key in keys:
            for ratio in self.grid.ratios:
                column = [c for c in cells if c.ratio == ratio and c.variant and c.variant.analysis_key == key]
                for cell in sorted(column, key=lambda cell: cell.is_trained):
                    yield self._attempt(cell)
                if not self.keep:
                    for cell in column:
                        shutil.rmtree(self._checkpoint(cell), ignore_errors=True)
                        shutil.rmtree(self._checkpoint(cell.untrained), ignore_errors=True)
            if all(map(self._is_done, (cell for cell in cells if cell.variant and cell.variant.analysis_key == key))):
                shutil.rmtree(self._analysis(key), ignore_errors=True)

    def _attempt(self, cell: Cell) -> Cell:
        """Writes the record of a cell, whether it can be made or not."""
        started = time.perf_counter()
        reporter = SubReporter(self.reporter, f"{cell.name}: ")
        record: Record = {"name": cell.name, "settings": self._settings_of(cell)}
        record |= {"variant": cell.variant and cell.variant.name, "ratio": cell.ratio}
        try:
            record |= {"status": "done"} | self._make(cell, reporter)
        except Exception as error:  # whatever it is, the other cells shall be made
            if cell.variant is None and isinstance(error, InputError):
                raise  # what cannot be measured of the dense model cannot of any
            record |= {"status": "failed", "error": _described(error)}
            self.reporter.warn(f"{cell.name} failed: {first_line(error)}")
        record |= {"stages": dict(reporter.seconds), "total_seconds": time.perf_counter() - started}
        write_atomically(self._file(cell), json.dumps(record, indent=1).encode())
        return cell

    def _make(self, cell: Cell, reporter: Reporter) -> Record:
        grid = self.grid
        if cell.variant is None:
            nothing: Record = {"linears": [], "recovery": None, "compression_seconds": {}}
            return nothing | measure(
                grid.model,
                grid.measures,
                self.suite,
                offline=grid.offline,
                revision=grid.revision,
                reporter=reporter,
            )
        folder = self._compressed(cell.untrained, reporter)
        if cell.variant.recovery is not None:
            folder = self._trained(cell, folder, reporter)
        report = read_report(folder)
        record = {
            key: report[key] for key in ("achieved_ratio", "dense_params", "file_bytes", "dense_file_bytes", "linears")
        }
        record |= {"compression_seconds": report["seconds"], "allocation": report["allocation"]}
        record["recovery"] = report.get("recovery")
        if (analysis := self._analysis(cell.variant.analysis_key)).is_dir():
            write_atomically(self._spectra_file(cell.variant), json.dumps(read_spectra(analysis)).encode())
        record["checkpoint"] = str(folder.relative_to(self.folder)) if self.keep else None
        return record | measure(folder, grid.measures, self.suite, offline=grid.offline, reporter=reporter)

    def _compressed(self, cell: Cell, reporter: Reporter) -> Path:
        """Algorithm 1, once; every other ratio of the recipe finds its calibration and decomposition done."""
        folder = self._checkpoint(cell)
        if not self._is_made(cell):
            assert cell.variant is not None
            assert cell.ratio is not None
            with _advising(LESS_COMPRESSING):
                compress(
                    self.grid.model,
                    cell.variant.at(cell.ratio),
                    folder,
                    offline=self.grid.offline,
                    revision=self.grid.revision,
                    analysis_dir=self._analysis(cell.variant.analysis_key),
                    reporter=reporter,
                )
        return folder

    def _trained(self, cell: Cell, compressed: Path, reporter: Reporter) -> Path:
        folder = self._checkpoint(cell)
        if not self._is_made(cell):
            assert cell.variant is not None
            assert cell.variant.recovery is not None
            with _advising(LESS_TRAINING):
                recover(compressed, folder, cell.variant.recovery, offline=self.grid.offline, reporter=reporter)
        return folder

    def _settings_of(self, cell: Cell) -> Record:
        """As they are read again."""
        return json.loads(json.dumps(self.identity | self.grid.settings_of(cell)))

    def _is_done(self, cell: Cell) -> bool:
        found = self._read(cell)
        return found is not None and found["status"] == "done"

    def _read(self, cell: Cell) -> Record | None:
        file = self._file(cell)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def _file(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.file_name}.json"

    def _spectra_file(self, variant: Variant) -> Path:
        return self.folder / "spectra" / f"{file_name_of(variant.untrained.name)}.json"

    def _checkpoint(self, cell: Cell) -> Path:
        return (self.folder / "checkpoints" if self.keep else self.work) / cell.file_name

    def _analysis(self, key: str) -> Path:
        return self.work / f"analysis-{key}"


@contextmanager
def _tasks(grid: Grid, reporter: Reporter) -> Iterator[TaskSuite | None]:
    """The tasks made ready, and seen to fit the model; None where none are asked for."""
    measures = grid.measures
    if not measures.tasks:
        yield None
        return
    with open_tasks(
        measures.tasks,
        limit=measures.limit,
        num_fewshot=measures.num_fewshot,
        task_data=measures.task_data,
        offline=grid.offline,
        reporter=reporter,
    ) as suite:
        source = open_config(grid.model, offline=grid.offline, revision=grid.revision)
        check_models(suite, {grid.model: source.config})
        yield suite


@contextmanager
def _advising(advice: str) -> Iterator[None]:
    """Says what a grid can do about memory that is short, instead of what the command for one model can."""
    try:
        yield
    except ResourceError as error:
        if not error.advice:
            raise
        raise ResourceError(error.problem, advice) from error


def _described(error: Exception) -> Record:
    """What a record keeps of an error; of one that nobody expected, also where it arose."""
    if (ours := as_ours(error)) is not None:
        return {"type": type(ours).__name__, "message": str(ours), "exit_code": ours.exit_code}
    return {"type": type(error).__name__, "message": str(error), "exit_code": 1, "traceback": traceback.format_exc()}


def _with_new_fields(recipe: Record | None) -> Record | None:
    """A stored recipe, with what recipes did not have when it was stored at its default."""
    return None if recipe is None else make_recipe(recipe, "a stored recipe").to_dict()


def _flat(settings: Record, prefix: str = "") -> Record:
    flat: Record = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}: ") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
