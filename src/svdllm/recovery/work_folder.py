"""The work folder of a recovery: what decides its content, and what finished stages left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from svdllm.checkpoint.output import claim_work_folder
from svdllm.common.files import save_atomically, write_atomically
from svdllm.common.processes import is_first, num_processes
from svdllm.common.settings_file import FINGERPRINT_FILE, read_settings, refuse_other_settings
from svdllm.common.version import __version__
from svdllm.models.low_rank.lowrank import sha256_of
from svdllm.models.safetensors_files import weight_files
from svdllm.recovery.distributed import wait_for_all
from svdllm.recovery.models import Models
from svdllm.recovery.record import TrainingRecord
from svdllm.recovery.settings import Recovery
from svdllm.recovery.stage import Stage, Task
from svdllm.recovery.training_settings import OF_MEMORY

SETTINGS_FOLDER = "analysis"


@dataclass(frozen=True)
class WorkFolder:
    """The folder from which a killed run continues: its settings, and trained tensors with a record for every stage."""

    path: Path

    def open(self, decides: dict[str, Any], *, resume: bool) -> bool:
        """Makes the folder, or takes up that of an earlier run with the same settings; returns whether it did.

        Raises:
            InputError: the earlier run had other settings; names them.
        """
        if not resume and is_first():
            shutil.rmtree(self.path, ignore_errors=True)
        wait_for_all()
        if found := read_settings(self.path / SETTINGS_FOLDER):
            refuse_other_settings(found, decides, self.path)
            return True
        if is_first():
            claim_work_folder(self.path)
            (self.path / SETTINGS_FOLDER).mkdir(exist_ok=True)
            write_atomically(self.path / SETTINGS_FOLDER / FINGERPRINT_FILE, json.dumps(decides, indent=2).encode())
        return False

    def holds_progress(self) -> bool:
        """Whether anything was learnt that a later run can go on with."""
        kept = ("*.safetensors", "*/checkpoint-*/trainer_state.json", "*/block-*.safetensors")
        return any(True for pattern in kept for _ in self.path.glob(pattern))

    def once(self, stage: Stage, task: Task, models: Models) -> TrainingRecord:
        """Runs a stage, or returns the record that an earlier run left; the record is written last."""
        record = self.path / f"{task.file}.json"
        if record.is_file():
            return TrainingRecord(**json.loads(record.read_text(encoding="utf-8")))
        done, changed = stage.train(task, models)
        if is_first():
            if changed is not None:
                save_atomically(changed, self.path / f"{task.file}.safetensors")
            write_atomically(record, json.dumps(asdict(done)).encode())
            for checkpoint in task.folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        wait_for_all()
        return done


def deciding_settings(settings: Recovery, tasks: Sequence[Task], models: Models) -> dict[str, Any]:
    """Everything that decides the trained weights, by name."""
    chosen = settings.model_dump(mode="json", exclude=set(OF_MEMORY))
    return {
        **{f"recovery: {key}": value for key, value in chosen.items()},
        **{f"rows of {task.title}": task.fingerprint for task in tasks},
        "weights of the checkpoint": [sha256_of(path) for path in weight_files(models.folder)],
        "config of the checkpoint": sha256_of(models.folder / "config.json"),
        "teacher": models.teacher_fingerprint(),
        "processes": num_processes(),
        "svdllm version": __version__,
        "torch version": torch.__version__,
        "transformers version": transformers.__version__,
    }
