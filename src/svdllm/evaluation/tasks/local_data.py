"""Runs a task of the harness on local files: its definition is included, and the place of the data replaced."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from svdllm.common.errors import InputError, explaining
from svdllm.evaluation.tasks.local_files import TaskFile, find_files, read_file, require_split
from svdllm.models.low_rank.lowrank import sha256_of


@dataclass(frozen=True, kw_only=True)
class LocalTask:
    """A task with its definition in the harness, and its data by split.

    replaced: entries of the definition that name a split without a file, which the task does not need.
    """

    name: str
    definition: Path
    replaced: dict[str, None]
    evaluated: str
    data: dict[str, TaskFile]

    @property
    def evaluated_file(self) -> Path:
        return self.data[self.evaluated].path

    def record(self) -> dict[str, Any]:
        return {
            split: {"file": str(file.path), "rows": len(file.rows), "sha256": sha256_of(file.path)}
            for split, file in self.data.items()
        }


def prepare_local(manager: Any, name: str, folder: Path, num_fewshot: int | None) -> LocalTask:
    """Reads and checks the files of a task.

    The split that the definition evaluates on must be there, and the split that it takes the shown examples from, if it
    shows any. Other splits may be missing.

    Raises:
        InputError: there is no plain task of this name, or its files are missing or wrong.
    """
    if name not in manager.all_subtasks:
        raise InputError(f"{name} stands for several tasks; with --task-data name each task itself")
    entry = manager.task_index[name]
    definition: dict[str, Any] = entry.cfg
    if "class" in definition:
        raise InputError(f"{name} is a task that loads its data by code of its own: --task-data does not reach it")
    names = ("training_split", "validation_split", "test_split", "fewshot_split")
    splits = {key: definition[key] for key in names if definition.get(key)}
    evaluated = splits.get("test_split") or splits.get("validation_split")
    if evaluated is None:
        raise InputError(f"{name} has neither a test nor a validation split to be evaluated on")
    shown = _shown_split(definition, splits, num_fewshot)
    config_split = (definition.get("fewshot_config") or {}).get("split")
    known: list[str] = [*splits.values(), *([config_split] if config_split else [])]
    found = find_files(folder, name, list(dict.fromkeys(known)), evaluated)
    if shown:
        require_split(found, folder, name, shown[0], f"shows {shown[1]} examples of")
    data = {split: read_file(path, name) for split, path in found.items()}
    if shown and len(data[shown[0]].rows) < shown[1] + (shown[0] == evaluated):
        file = data[shown[0]]
        raise InputError(f"{file.path} has {len(file.rows)} rows, and {name} shows {shown[1]} examples of it: add rows")
    replaced = dict.fromkeys(key for key, split in splits.items() if split not in data)
    if config_split and config_split not in data:
        replaced["fewshot_config"] = None
    return LocalTask(name=name, definition=Path(entry.yaml_path), replaced=replaced, evaluated=evaluated, data=data)


def write_definitions(tasks: list[LocalTask], folder: Path) -> Any:
    """Writes data and definitions into an empty folder; returns a ``TaskManager`` of the harness that knows them."""
    from lm_eval.tasks import TaskManager

    for task in tasks:
        files = {
            split: str(_write_rows(folder / f"{task.name}.{split}.parquet", file)) for split, file in task.data.items()
        }
        definition = {
            "include": str(task.definition),
            "task": task.name,
            "custom_dataset": None,
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
            **task.replaced,
        }
        (folder / f"{task.name}.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")
    return TaskManager(include_defaults=False, include_path=str(folder))


def _shown_split(definition: dict[str, Any], splits: dict[str, str], num_fewshot: int | None) -> tuple[str, int] | None:
    """The split of the examples that the harness shows before a question, and their number; None if it shows none."""
    own = definition.get("num_fewshot")
    count = own if own == 0 or num_fewshot is None else num_fewshot
    settings = definition.get("fewshot_config") or {}
    if not count or settings.get("samples"):
        return None
    order = (
        settings.get("split"),
        *map(splits.get, ("fewshot_split", "training_split", "validation_split", "test_split")),
    )
    return next(split for split in order if split), count


def _write_rows(place: Path, file: TaskFile) -> Path:
    import pyarrow
    from pyarrow import parquet

    with explaining(f"{file.path}: a column holds values of more than one type"):
        parquet.write_table(pyarrow.Table.from_pylist(file.rows), place)
    return place
