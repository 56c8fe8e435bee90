"""A comparison from beginning to end: check, make and measure cell by cell, continue where an earlier run stopped."""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from svdllm.checkpoint.output import LOCK, followed, is_empty, require_writable
from svdllm.common.device import resolve_device
from svdllm.common.disk import explain_full_disk
from svdllm.common.errors import InputError, as_ours, first_line
from svdllm.common.extras import require_extra
from svdllm.common.locks import locked
from svdllm.common.memory import device_peak_bytes, forget_peaks, peak_bytes
from svdllm.common.progress import Reporter, SubReporter
from svdllm.comparison.cells import GRID_FILE, Cells, Record
from svdllm.comparison.fingerprint import identity_of
from svdllm.comparison.foreign import Foreign, removed_share
from svdllm.comparison.machines import machine_of
from svdllm.comparison.measure import measure
from svdllm.comparison.settings import Cell, Grid
from svdllm.comparison.speeds import measure_speeds
from svdllm.data import check_source
from svdllm.evaluation.tasks import TaskSuite, check_models, open_tasks
from svdllm.models.limits import context_length, require_context
from svdllm.models.open import open_config

GOES_ON = "The same command goes on with what is finished."


def run_grid(
    grid: Grid,
    folder: str | Path,
    *,
    keep: bool = False,
    bench: bool = False,
    reporter: Reporter | None = None,
    on_cell: Callable[[list[Record]], object] | None = None,
) -> list[Record]:
    """Makes and measures every cell; returns their records, in the grid's order.

    A cell that fails becomes a record with its error, and the others are still made. Finished cells are files in
    ``folder/cells``: the same grid continues with them, and so does one with more variants or ratios. Failed cells are
    tried again.

    Args:
        folder: made by this call, or left by an earlier one.
        keep: leave every checkpoint in ``folder/checkpoints``; otherwise it is removed once it is measured.
        bench: measure prefill and decode of every checkpoint that was kept beside the dense model, in the end.
        on_cell: is called with all records so far after each new one.

    Raises:
        InputError, UnsupportedModelError: something is wrong with the grid as a whole; before any work.
    """
    reporter = reporter or Reporter()
    context = context_length(open_config(grid.model, offline=grid.offline, revision=grid.revision).config)
    grid, folder = grid.within(context), followed(Path(folder))
    _check(grid, folder, reporter)
    with locked(folder / LOCK, folder) as warning, explain_full_disk(folder, GOES_ON):
        if warning is not None:
            reporter.warn(warning)
        cells = Cells(grid=grid, folder=folder, keep=keep, identity=identity_of(grid))
        cells.refuse_other_settings(reporter)
        with _tasks(grid, reporter) as suite:
            cells.make_folders()
            for _ in _Run(grid=grid, cells=cells, suite=suite, reporter=reporter).execute():
                if on_cell is not None:
                    on_cell(cells.records())
        for _ in measure_speeds(cells, reporter) if bench else ():
            if on_cell is not None:
                on_cell(cells.records())
        records = cells.records()
        if all(record["status"] == "done" for record in records):
            shutil.rmtree(cells.work, ignore_errors=True)
        return records


def _check(grid: Grid, folder: Path, reporter: Reporter) -> None:
    """Raises for anything that is wrong with any cell, before the first one is made."""
    require_extra("matplotlib", "a report", extra="report")
    require_writable(folder)
    if folder.is_dir() and not is_empty(folder, LOCK) and not (folder / GRID_FILE).is_file():
        raise InputError(f"{folder} exists, is not empty, and is no report of an earlier run: name another folder.")
    names = [cell.file_name for cell in grid.cells]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"Two models of the grid are called {twice[0]}: give each method and value once.")
    for text in grid.measures.texts:
        check_source(text)
    if grid.measures.texts:
        source = open_config(grid.model, offline=grid.offline, revision=grid.revision)
        require_context(source.config, grid.measures.seqlen, "--ppl-seqlen")
    for variant in grid.variants:
        variant.check(grid.model, grid.ratios, grid.options(reporter))


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The work that is left in a folder that no other run writes to."""

    grid: Grid
    cells: Cells
    suite: TaskSuite | None
    reporter: Reporter

    def execute(self) -> Iterator[Cell]:
        """Yields every cell once its record is written: the dense model, then by analysis and ratio."""
        left = [cell for cell in self.grid.cells if not self.cells.is_done(cell)]
        columns: dict[str, dict[float | None, list[Cell]]] = {}
        for cell in left:
            if cell.variant is None:
                yield self._attempt(cell)
            else:
                columns.setdefault(cell.variant.key, {}).setdefault(cell.ratio, []).append(cell)
        for by_ratio in columns.values():
            made = [cell for column in by_ratio.values() for cell in column]
            for column in by_ratio.values():
                for cell in sorted(column, key=lambda cell: cell.base is not None):
                    yield self._attempt(cell)
                for cell in column:
                    self.cells.discard(cell)
            if made[0].variant is not None and all(map(self.cells.is_done, made)):
                shutil.rmtree(self.cells.analysis(made[0].variant), ignore_errors=True)

    def _attempt(self, cell: Cell) -> Cell:
        """Writes the record of a cell, whether it can be made or not."""
        started = time.perf_counter()
        reporter = SubReporter(self.reporter, f"{cell.name}: ")
        record: Record = {"name": cell.name, "settings": self.cells.settings_of(cell)}
        record |= {"variant": cell.variant and cell.variant.name, "ratio": cell.ratio}
        try:
            record |= {"status": "done"} | self._measured(cell, reporter)
        except Exception as error:  # whatever it is, the other cells shall be made
            if cell.variant is None and isinstance(error, InputError):
                raise  # what cannot be measured of the dense model cannot of any
            record |= {"status": "failed", "error": _described(error)}
            self.reporter.warn(f"{cell.name} failed: {first_line(error)}")
        record |= {"stages": dict(reporter.seconds), "total_seconds": time.perf_counter() - started}
        record["machine"] = machine_of(self.grid.measures.device)
        self.cells.write(cell, record)
        return cell

    def _measured(self, cell: Cell, reporter: Reporter) -> Record:
        """Makes the model of a cell and measures it."""
        options = replace(self.grid.options(reporter), revision=None if cell.variant else self.grid.revision)
        if cell.variant is None:
            nothing: Record = {"linears": [], "recovery": None, "compression_seconds": {}}
            return nothing | measure(self.grid.model, self.grid.measures, self.suite, options)
        device = resolve_device(self.grid.measures.device)
        from_here = forget_peaks(device)
        place = self._made(cell, reporter)
        peaks: Record = {"ram": peak_bytes() if from_here else None, "device": device_peak_bytes(device)}
        self.cells.write_spectra(cell.variant)
        is_ours = Path(place).is_relative_to(self.cells.folder)
        kept = str(Path(place).relative_to(self.cells.folder)) if self.cells.keep and is_ours else None
        described: Record = cell.variant.record(place) | {"checkpoint": kept, "peak_bytes": peaks}
        record = measure(place, self.grid.measures, self.suite, options) | described
        if isinstance(cell.variant, Foreign):
            record["own_tokenizer"] = cell.variant.has_own_tokenizer(self.grid.model, self.grid.options(reporter))
        if "achieved_ratio" not in record:
            record["achieved_ratio"] = self._removed_share(record["params"], reporter)
        return record

    def _made(self, cell: Cell, reporter: Reporter) -> str | Path:
        """The model of a cell, which an earlier run may have made; the one that it begins with is made first."""
        assert cell.variant is not None
        folder = self.cells.checkpoint(cell)
        if self.cells.holds_model(cell):
            return folder
        model = self.grid.model if cell.base is None else str(self._made(cell.base, reporter))
        folder.parent.mkdir(parents=True, exist_ok=True)
        analysis = self.cells.analysis(cell.variant)
        return cell.variant.make(model, cell.ratio, folder, analysis, self.grid.options(reporter))

    def _removed_share(self, params: int, reporter: Reporter) -> float | None:
        dense = self.cells.read(self.grid.cells[0])
        if dense is None or dense["status"] != "done":
            return None
        return removed_share(self.grid.model, dense["params"], params, self.grid.options(reporter))


@contextmanager
def _tasks(grid: Grid, reporter: Reporter) -> Iterator[TaskSuite | None]:
    """Opens the tasks and checks that they fit the model; yields None if none are asked for."""
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


def _described(error: Exception) -> Record:
    """An error as a record keeps it; one that nobody expected keeps its traceback."""
    if (ours := as_ours(error)) is not None:
        return {"type": type(ours).__name__, "message": str(ours), "exit_code": ours.exit_code}
    return {"type": type(error).__name__, "message": str(error), "exit_code": 1, "traceback": traceback.format_exc()}
