"""Writes the trained checkpoint: the same ranks and format, other weights, and the history of its training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from svdllm.checkpoint.finish import RECIPE_FILE, copy_companions, finish_checkpoint
from svdllm.checkpoint.report import read_report
from svdllm.checkpoint.shards import write_shards
from svdllm.compression.recipe_files import settings_of_copy
from svdllm.recovery.models import Models


def write_trained(new: Path, models: Models, history: dict[str, Any]) -> None:
    """Writes the checkpoint into the folder ``new``, which is made anew; ``history`` is added to its report."""
    shutil.rmtree(new, ignore_errors=True)
    (new / "svdllm").mkdir(parents=True)
    with models.reporter.stage("write", 1):
        weights, folder = models.weights(), models.folder
        write_shards(new, weights, {name: weights.shape_and_dtype(name) for name in weights.names()})
        copy_companions(folder, new)
        shutil.copyfile(folder / "config.json", new / "config.json")
        report = read_report(folder)
        settings, _ = settings_of_copy(folder / RECIPE_FILE)
        report["recovery"] = [*report.get("recovery", []), history]
        finish_checkpoint(new, settings, report, models.device, models.reporter)
