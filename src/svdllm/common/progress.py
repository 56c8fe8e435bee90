"""How a long run tells what it does: a reporter that the command line, or a notebook, may replace."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Reporter:
    """Silent; subclasses draw. Every run is a sequence of stages, each of a known number of steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []

    @contextmanager
    def stage(self, name: str, steps: int) -> Iterator[None]:
        """Times a stage; stages of one name add up."""
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
        """``done`` of ``steps`` of the current stage are finished."""

    def note(self, text: str) -> None:
        """A line worth reading."""

    def block_done(self, index: int, num_blocks: int, forward_seconds: float, decompose_seconds: float) -> None:
        """A block's analysis is final."""

    def warn(self, text: str) -> None:
        """Something the user should know, though the run goes on."""
        self.warnings.append(text)


class SubReporter(Reporter):
    """Passes on what a part of a larger run tells, and keeps that part's times for itself."""

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
