"""Output for people: results on standard output, progress on standard error, bars only on a terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from svdllm.common.progress import Reporter

# Seconds between two lines on the progress of a stage, where there is no terminal.
FIRST_PAUSE, LONGEST_PAUSE = 10.0, 600.0

# No markup: names and paths may hold brackets.
console = Console(highlight=False, markup=False)
error_console = Console(stderr=True, highlight=False, markup=False)


class ConsoleReporter(Reporter):
    """Shows a bar with the time left on a terminal; elsewhere a line when a stage begins and ends, and some between."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__()
        self._clock = clock
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._name, self._begun = "", 0.0
        self._pause, self._next_line = FIRST_PAUSE, 0.0
        self._first: tuple[int, float] | None = None  # what was done when, as was told first in a stage

    def start_stage(self, name: str, steps: int) -> None:
        self._name, self._begun = name, self._clock()
        self._pause, self._next_line = FIRST_PAUSE, self._begun + FIRST_PAUSE
        self._first = None
        if not error_console.is_terminal:
            if steps > 1:
                error_console.print(f"{name} ...", soft_wrap=True)
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
        seconds = self._clock() - self._begun
        if seconds >= 1:
            error_console.print(f"{name} took {duration(seconds)}", soft_wrap=True)

    def advance(self, done: int, steps: int) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=steps)
        elif not error_console.is_terminal and 0 < done < steps:
            self._print_now_and_then(done, steps)

    def _print_now_and_then(self, done: int, steps: int) -> None:
        """Prints a line if the last one is long enough ago; the pauses grow, so that a log of days stays short."""
        now = self._clock()
        if self._first is None or done < self._first[0]:
            self._first = done, now  # not nothing, where an earlier run had done a part
        if now < self._next_line:
            return
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._next_line = now + self._pause
        before, since = self._first
        left = f", about {duration((now - since) / (done - before) * (steps - done))} left" if done > before else ""
        error_console.print(f"{self._name}: {100 * done // steps} % done{left}", soft_wrap=True)

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


def show_next(*commands: str) -> None:
    """Shows the commands that may follow, without the ``svdllm`` in front of each."""
    console.print("Next:", style="bold")
    for command in commands:
        console.print(f"  svdllm {command}", soft_wrap=True)


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


def duration_range(least: float, most: float) -> str:
    """Two durations in one unit, that of the longer: ``4 to 9 minutes``."""
    seconds, unit = next(
        (n, unit) for n, unit in ((3600, "hours"), (60, "minutes"), (1, "seconds")) if most >= 2 * n or n == 1
    )
    low, high = (max(1, round(value / seconds)) for value in (least, most))
    return f"{low} to {high} {unit}" if low < high else f"{high} {unit if high > 1 else unit[:-1]}"
