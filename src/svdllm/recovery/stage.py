"""What one stage of training is given."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from svdllm.common.progress import Reporter
from svdllm.recovery.settings import Recovery

Rows = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One stage: a method, or one half of the sequential update.

    ``rows`` and ``held_out`` are (input_ids, labels) of every sequence; ``folder`` is for what a killed stage goes on
    from, and is removed by whoever made the task.
    """

    file: str  # the name of what it leaves behind
    title: str  # for progress and the record
    method: str
    rows: Rows
    held_out: Rows = ()
    settings: Recovery
    folder: Path
    log_dir: Path | None = None
    reporter: Reporter = field(default_factory=Reporter)

    @property
    def fingerprint(self) -> str:
        """A hash of all tokens and labels."""
        digest = hashlib.sha256()
        for row in (*self.rows, *self.held_out):
            for part in row:
                digest.update(part.numpy().tobytes())
        return digest.hexdigest()
