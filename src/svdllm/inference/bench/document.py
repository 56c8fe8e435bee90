"""Stores a benchmark in a folder: the document and its plots."""

from __future__ import annotations

import json
from pathlib import Path

from svdllm.checkpoint.output import require_new
from svdllm.common.errors import InputError
from svdllm.common.extras import require_extra
from svdllm.common.files import write_atomically
from svdllm.inference.bench import BenchmarkRecord
from svdllm.inference.bench.plots import memory_figure, throughput_figure

DOCUMENT = "bench.json"
FIGURES = {"throughput.svg": throughput_figure, "memory.svg": memory_figure}


def check_output(folder: Path) -> None:
    """Raises InputError if the folder is not empty, or cannot be made, or matplotlib is missing."""
    require_extra("matplotlib", "--output", extra="report")
    if folder.suffix.lower() == ".json":
        raise InputError(f"--output {folder}: the output is a folder, for {DOCUMENT} and plots. Choose another name.")
    require_new(folder)


def store_benchmark(record: BenchmarkRecord, folder: Path) -> None:
    """Writes ``bench.json``, and the plots if anything was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    document = json.dumps(record.to_dict(), indent=2, allow_nan=False) + "\n"
    write_atomically(folder / DOCUMENT, document.encode())
    if any(cell.error is None for cell in record.cells):
        for name, draw in FIGURES.items():
            write_atomically(folder / name, draw(record).encode())
