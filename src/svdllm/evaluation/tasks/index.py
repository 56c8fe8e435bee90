"""Finds tasks of the harness by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svdllm.common.errors import InputError, did_you_mean


def find_tasks(names: Sequence[str]) -> Any:
    """Makes a ``TaskManager`` of the harness that knows all the ``names``: tasks, groups or tags.

    To read all its 14,000 definitions takes half a minute. The folder of a task is mostly named like it, so folders
    with such names are read first, and all others only if a name is missing there.

    Raises:
        InputError: a name is unknown; suggests similar names.
    """
    from lm_eval.tasks import TaskManager

    near = [folder for name in names if (folder := _folder_named_like(name)) is not None]
    if len(near) == len(names):
        manager = TaskManager(include_defaults=False, include_path=[str(folder) for folder in dict.fromkeys(near)])
        if set(names) <= set(manager.all_subtasks):
            return manager
    manager = TaskManager(include_defaults=False, include_path=str(tasks_folder()))
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        raise InputError("; ".join(_unknown(name, manager.all_tasks) for name in unknown))
    return manager


def tasks_folder() -> Path:
    """The folder of the harness's definitions."""
    spec = importlib.util.find_spec("lm_eval.tasks")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _folder_named_like(name: str) -> Path | None:
    """The folder with the longest beginning of a name, such as ``arc`` for ``arc_easy``."""
    parts = name.split("_")
    candidates = (tasks_folder() / "_".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((folder for folder in candidates if folder.is_dir()), None)


def _unknown(name: str, known: Sequence[str]) -> str:
    guess = did_you_mean(name, known, most=3) or ": `lm-eval ls tasks` lists them all"
    return f"lm-evaluation-harness has no task '{name}'{guess}"
