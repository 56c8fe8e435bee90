"""What a person sees: results on standard output, progress on standard error, bars only on a terminal."""

from __future__ import annotations

import json
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from svdllm.progress import Reporter

# No markup: names and paths may hold brackets.
console = Console(highlight=False, markup=False)
error_console = Console(stderr=True, highlight=False, markup=False)


class ConsoleReporter(Reporter):
    """A bar with the time left on a terminal; elsewhere a line per stage and per finished block."""

    def __init__(self) -> None:
        super().__init__()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._begun = 0.0
        self._blocks_begun: float | None = None
        self._first_block = 0
        self._backwards = False  # the reverse walk ends with block 0

    def start_stage(self, name: str, steps: int) -> None:
        self._begun = time.perf_counter()
        self._blocks_begun = None
        self._backwards = name == "gradients"
        if not error_console.is_terminal:
            if steps > 1:
                error_console.print(f"{name} ...")
            return
        self._progress = Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=40),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=error_console,
            transient=True,
        )
        self._task = self._progress.add_task(name, total=steps)
        self._progress.start()

    def end_stage(self, name: str) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        seconds = time.perf_counter() - self._begun
        if seconds >= 1:
            error_console.print(f"{name} took {duration(seconds)}")

    def advance(self, done: int, steps: int) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=steps)

    def block_done(self, index: int, num_blocks: int, forward_seconds: float, decompose_seconds: float) -> None:
        now = time.perf_counter()
        if self._blocks_begun is None:
            self._blocks_begun, self._first_block = now - forward_seconds - decompose_seconds, index
        if not error_console.is_terminal:
            done = abs(index - self._first_block) + 1
            left = (now - self._blocks_begun) / done * (index if self._backwards else num_blocks - index - 1)
            error_console.print(
                f"block {index + 1}/{num_blocks}: forward and statistics {forward_seconds:.1f} s, "
                f"spectra {decompose_seconds:.1f} s, about {duration(left)} left"
            )

    def note(self, text: str) -> None:
        error_console.print(text)

    def warn(self, text: str) -> None:
        super().warn(text)
        print_warning(text)


def print_warning(text: str) -> None:
    error_console.print("Warning:", text, style="yellow", soft_wrap=True)


def show(titled: tuple[str, list[Table]]) -> None:
    title, tables = titled
    console.print(title, style="bold", soft_wrap=True)
    for table in tables:
        console.print(table)


def print_json(document: Any) -> None:
    """One JSON document on standard output and nothing else."""
    print(json.dumps(document, indent=2, default=str, allow_nan=False))


def size(num_bytes: float) -> str:
    """``452.9 MB``: decimal units, as disks and download pages count."""
    for unit in ("B", "kB", "MB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} GB"


def count(number: int) -> str:
    """``113.2 M`` of parameters."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M" if number >= 1e5 else f"{number:,}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
