"""The record of one stage of training, from which tables, cards and JSON are made."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """The work and the losses of a stage. ``tokens`` are counted without padding.

    ``losses`` are (step, mean loss since the previous entry); those of blockwise are (block, relative error of its
    outputs after training). ``held_out`` are (step, mean loss of the held-out examples).
    """

    stage: str
    steps: int
    tokens: int
    seconds: float
    trained_params: int
    losses: list[tuple[float, float]]
    held_out: list[tuple[float, float]] = field(default_factory=list)
