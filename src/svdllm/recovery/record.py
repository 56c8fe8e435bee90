"""The record of one stage of training, from which tables, cards and JSON are made."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """What a stage did; tokens without padding.

    ``losses`` are (step, mean loss since the last entry), ``held_out`` (step, mean loss of the held-out examples); of
    blockwise, ``losses`` are (block, what is left of its output's error).
    """

    stage: str
    steps: int
    tokens: int
    seconds: float
    trained_params: int
    losses: list[tuple[float, float]]
    held_out: list[tuple[float, float]] = field(default_factory=list)
