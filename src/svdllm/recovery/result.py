"""The record of a recovery, from which tables, cards and JSON are made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from svdllm.evaluation.perplexity import Perplexity
from svdllm.recovery.record import TrainingRecord
from svdllm.recovery.settings import Recovery

Measured = dict[str, dict[str, Perplexity]]  # text -> model (before, after, teacher) -> its perplexity


@dataclass(frozen=True, kw_only=True)
class RecoveryResult:
    """The record of a recovery."""

    output_dir: Path
    settings: Recovery
    stages: list[TrainingRecord]
    examples: dict[str, Any]
    perplexity: Measured
    seconds: dict[str, float]
    peak_ram_bytes: int
    warnings: list[str]

    @property
    def tokens(self) -> int:
        return sum(stage.tokens for stage in self.stages)

    def history(self) -> dict[str, Any]:
        """The part of the record that the checkpoint keeps."""
        return {
            "settings": self.settings.model_dump(mode="json"),
            "tokens": self.tokens,
            "stages": [asdict(stage) for stage in self.stages],
            "examples": self.examples,
            "perplexity": {
                text: {model: row.to_dict() for model, row in rows.items()} for text, rows in self.perplexity.items()
            },
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            "output_dir": str(self.output_dir),
            **self.history(),
            "seconds": self.seconds,
            "peak_ram_bytes": self.peak_ram_bytes,
            "warnings": self.warnings,
        }
