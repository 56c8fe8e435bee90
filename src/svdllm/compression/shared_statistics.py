"""Keeps the statistics of the inputs on disk, for runs of other recipes over the same calibration tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from svdllm.common.files import save_atomically
from svdllm.compression.analysis import Analysis
from svdllm.compression.math.statistics import Statistic
from svdllm.compression.session import Run
from svdllm.models.structure import Target


@dataclass(frozen=True)
class StoredStatistic:
    """The value of a statistic, without the means to add tokens to it."""

    stored: Tensor

    def value(self) -> Tensor:
        return self.stored.clone()


@dataclass(frozen=True)
class SharedStatistics:
    """A folder of statistics: one file per block, in float64."""

    folder: Path

    @classmethod
    def of(cls, folder: Path, settings: Mapping[str, Any]) -> SharedStatistics:
        """The statistics that ``settings`` decide, in a folder of their own within ``folder``."""
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        return cls(folder / name)

    def is_complete(self, num_blocks: int) -> bool:
        return all(self._file(block).is_file() for block in range(num_blocks))

    def read(self, block: int, targets: Sequence[Target]) -> dict[str, StoredStatistic]:
        """Target -> statistic."""
        tensors = load_file(self._file(block))
        return {target.name: StoredStatistic(tensors[target.group]) for target in targets}

    def write(self, block: int, targets: Sequence[Target], statistics: Mapping[str, Statistic]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        leaders = {target.group: target.name for target in targets}
        save_atomically(
            {group: statistics[name].value().cpu().contiguous() for group, name in leaders.items()}, self._file(block)
        )

    def _file(self, block: int) -> Path:
        return self.folder / f"block-{block:04d}.safetensors"


def shared_statistics(run: Run, analysis: Analysis) -> SharedStatistics | None:
    """Where the statistics are shared with other runs; None where they are not."""
    if run.statistics_dir is None or run.recipe.bias_correction:
        return None
    names = ("recipe: method", "recipe: batch_tokens", "recipe: joint_kv")
    beside = {key: value for key, value in analysis.settings.items() if key in names or not key.startswith("recipe: ")}
    return SharedStatistics.of(run.statistics_dir, beside)
