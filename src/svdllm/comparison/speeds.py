"""Measures prefill and decode of every kept model of a comparison, in turns beside the dense model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from svdllm.checkpoint.load import load_model
from svdllm.common.device import resolve_device, resolve_dtype
from svdllm.common.errors import as_ours, first_line
from svdllm.common.memory import explain_out_of_memory
from svdllm.common.progress import Reporter, SubReporter
from svdllm.comparison.cells import Cells, Record
from svdllm.comparison.foreign import Foreign
from svdllm.comparison.settings import DENSE, Cell
from svdllm.inference.bench.checks import check_room, shortest_context
from svdllm.inference.bench.run import benchmark_loaded
from svdllm.inference.bench.settings import BenchSettings
from svdllm.models.open import open_config

MODEL = "model"  # the name of a compared model in its benchmark
SETTINGS = BenchSettings(batch_sizes=(1,))
SIMULATED = "simulated: it runs with dequantised weights of the dense model's size"
NOT_KEPT = "its checkpoint was not kept: give another folder, with --bench from the beginning"
ADVICE = "Measure speed where there is more memory: the same command goes on with what is finished."


def measure_speeds(cells: Cells, reporter: Reporter) -> Iterator[Cell]:
    """Yields every finished cell once its speed, or why there is none, is written. Measured ones stay as they are."""
    for cell in cells.grid.cells:
        record, known = cells.read(cell), cells.read_speed(cell)
        is_done = record is not None and record["status"] == "done"
        if cell.variant is None or not is_done or (known is not None and known["error"] is None):
            continue
        assert record is not None
        place = cell.variant.source if isinstance(cell.variant, Foreign) else _kept(cells.folder, record)
        why = SIMULATED if record.get("simulated") else NOT_KEPT if place is None else None
        if why is None:
            assert place is not None
            cells.write_speed(cell, _speed(cells, place, SubReporter(reporter, f"{cell.name}: ")))
        else:
            cells.write_speed(cell, _none(why))
        yield cell


def _kept(folder: Path, record: Record) -> Path | None:
    return None if record["checkpoint"] is None else folder / record["checkpoint"]


def _none(why: str) -> Record:
    return {"error": why, "prompt": None, "gen": None, "machine": None, "dense": None, MODEL: None}


def _speed(cells: Cells, place: str | Path, reporter: Reporter) -> Record:
    """One sequence with the longest prompt of the usual ones that both models take."""
    grid = cells.grid
    try:
        device = resolve_device(grid.measures.device)
        options = grid.options(reporter)
        dense = open_config(grid.model, offline=options.offline, revision=options.revision)
        other = open_config(str(place), offline=options.offline, allow_quantized=True)
        dtype = resolve_dtype(grid.measures.dtype, device, dense.dtype)
        settings = SETTINGS.within(shortest_context([dense.config, other.config]))
        settings = replace(settings, prompts=(max(settings.prompt_lengths),))
        check_room([dense, other], dtype, device)
        loading: dict[str, Any] = {"dtype": dtype, "local_files_only": options.offline}
        named = {} if options.revision is None else {"revision": options.revision}
        with explain_out_of_memory(ADVICE):
            models = {
                DENSE: load_model(grid.model, **loading, **named).to(device),  # type: ignore[arg-type]
                MODEL: load_model(place, **loading).to(device),  # type: ignore[arg-type]
            }
            found = benchmark_loaded(models, DENSE, settings, reporter=reporter)
    except Exception as error:  # whatever it is, the other models shall be measured
        return _none(str(as_ours(error) or f"{type(error).__name__}: {first_line(error)}"))
    of_dense, of_model = (cell.to_dict() for cell in found.cells)
    shape = {"prompt": of_model["prompt"], "gen": of_model["gen"], "machine": found.machine}
    return {"error": of_model["error"] or of_dense["error"], **shape, "dense": of_dense, MODEL: of_model}
