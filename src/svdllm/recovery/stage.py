"""A stage of a recovery: what a method announces, and what it is given when the stage runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from svdllm.common.processes import num_processes
from svdllm.common.progress import Reporter
from svdllm.recovery.models import Models
from svdllm.recovery.record import TrainingRecord
from svdllm.recovery.training_settings import Schedule, TrainingSettings

Rows = Sequence[tuple[Tensor, Tensor]]
# A batch's loss summed over its tokens, and the number of these tokens.
Loss = Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, Tensor]]
# The trained tensors by name; None where the method wrote files of them itself.
Trained = tuple[TrainingRecord, dict[str, Tensor] | None]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One stage of training, as it is handed to its method.

    ``rows`` and ``held_out`` are (input_ids, labels) of every sequence. ``folder`` keeps the state from which a killed
    stage continues; the run that made the task removes it.
    """

    file: str  # name of the files that the stage leaves
    title: str  # for progress and the record
    rows: Rows
    held_out: Rows = ()
    settings: TrainingSettings
    schedule: Schedule
    dtype: torch.dtype = torch.float32  # of the products
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

    @property
    def sequences_at_once(self) -> int:
        """The number of sequences in a micro-batch of this process."""
        return self.schedule.sequences_at_once(self.settings.micro_batch, num_processes())

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(ids) for ids, _ in self.rows)


class Stage(NamedTuple):
    """A stage that a method announces. ``title`` and ``file`` are unique among the stages of the method."""

    title: str
    file: str
    train: Callable[[Task, Models], Trained]
