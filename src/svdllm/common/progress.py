"""Reports the progress of a long run; the command line or a notebook may replace the reporter."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Reporter:
    """Follows a run as a sequence of stages, each with a known number of steps. Silent; subclasses draw."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []

    @contextmanager
    def stage(self, name: str, steps: int) -> Iterator[None]:
        """Times a stage; the times of stages with the same name add up."""
        started = time.perf_counter()
        self.start_stage(name, steps)
        try:
            yield
        finally:
            self.end_stage(name)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def start_stage(self, name: str, steps: int) -> None: ...

    def end_stage(self, name: str) -> None: ...

    def advance(self, done: int, steps: int) -> None:
        """Called when ``done`` of ``steps`` of the current stage are finished."""

    def note(self, text: str) -> None:
        """Called with a line worth reading."""

    def block_done(self, index: int, num_blocks: int, forward_seconds: float, decompose_seconds: float) -> None:
        """Called when the analysis of a block is complete."""

    def warn(self, text: str) -> None:
        """Called with what the user should know, while the run goes on."""
        self.warnings.append(text)


class SubReporter(Reporter):
    """Passes on the reports of a part of a larger run, and keeps the times of this part for itself."""

    def __init__(self, outer: Reporter, prefix: str):
        super().__init__()
        self._outer, self._prefix = outer, prefix

    def start_stage(self, name: str, steps: int) -> None:
        self._outer.start_stage(f"{self._prefix}{name}", steps)

    def end_stage(self, name: str) -> None:
        self._outer.end_stage(f"{self._prefix}{name}")

    def advance(self, done: int, steps: int) -> None:
        self._outer.advance(done, steps)

    def note(self, text: str) -> None:
        self._outer.note(text)

    def block_done(self, index: int, num_blocks: int, forward_seconds: float, decompose_seconds: float) -> None:
        self._outer.block_done(index, num_blocks, forward_seconds, decompose_seconds)

    def warn(self, text: str) -> None:
        super().warn(text)
        self._outer.warn(text)
