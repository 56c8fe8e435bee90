"""Prepares tasks before a model is loaded: finds them, loads their data and checks it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from svdllm.common.errors import InputError, explaining, first_line
from svdllm.common.extras import require_extra
from svdllm.common.progress import Reporter
from svdllm.data.hub_datasets import hub_offline
from svdllm.evaluation.tasks.index import find_tasks
from svdllm.evaluation.tasks.local_data import LocalTask, prepare_local, write_definitions
from svdllm.evaluation.tasks.quiet import quiet
from svdllm.models.limits import require_context

GENERATED_TOKENS = 256  # the harness's default
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True, kw_only=True)
class TaskSuite:
    """Tasks and groups of the harness, ready to run, with their settings.

    manager: of the harness.
    members: the single tasks by name, also of groups.
    chances: accuracy of guessing, by task.
    files: task -> split -> file, of local data.
    """

    manager: Any
    tasks: list[Any]
    members: dict[str, Any]
    limit: int | None
    num_fewshot: int | None
    chances: dict[str, float]
    files: dict[str, dict[str, Any]]


@contextmanager
def open_tasks(
    names: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    task_data: str | Path | None = None,
    offline: bool = False,
    reporter: Reporter | None = None,
) -> Iterator[TaskSuite]:
    """Opens tasks of lm-evaluation-harness by name, with its prompts, metrics and numbers of shown examples.

    Args:
        names: tasks, groups or tags of the harness; with ``task_data``, tasks.
        limit: use only this many examples of every task, from the first.
        num_fewshot: number of shown examples, instead of the task's own. As in the harness, a task that is defined
            with none keeps none; a warning names it.
        task_data: a folder with the tasks' data (docs/evaluation.md); the hub is not asked then.
        offline: never ask the hub; its local cache is used.

    Raises:
        InputError: a task is unknown, its data is not available or does not fit, or a package is missing.
    """
    reporter = reporter or Reporter()
    names = _check_settings(names, limit, num_fewshot)
    with ExitStack() as stack:
        stack.enter_context(quiet())
        with reporter.stage("find tasks", 1):
            manager = find_tasks(names)
        local: dict[str, LocalTask] = {}
        if task_data is not None:
            local = {name: prepare_local(manager, name, Path(task_data), num_fewshot) for name in names}
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="svdllm-", ignore_cleanup_errors=True))
            manager = write_definitions(list(local.values()), Path(folder))
        with reporter.stage("load tasks", 1), hub_offline(offline or task_data is not None):
            built = [_load(manager, name, local.get(name)) for name in names]
            members = _members(manager, built)
        for name, task in members.items():
            _check_task(name, task, num_fewshot, reporter)
        yield TaskSuite(
            manager=manager,
            tasks=[task for tasks in built for task in tasks],
            members=members,
            limit=limit,
            num_fewshot=num_fewshot,
            chances=_chances(members, local, limit),
            files={name: task.record() for name, task in local.items()},
        )


def check_models(suite: TaskSuite, configs: dict[str, PreTrainedConfig]) -> None:
    """Raises InputError if the context of a model (configs by name) is too short for the answers of a task."""
    for task_name, task in suite.members.items():
        if task.OUTPUT_TYPE != "generate_until":
            continue
        settings = task.config.generation_kwargs or {}
        length = next((settings[name] for name in LENGTH_NAMES if settings.get(name)), GENERATED_TOKENS)
        for name, config in configs.items():
            what = f"{task_name}: an answer of {length} tokens after a prompt of at least one,"
            require_context(config, length + 1, what, model=name, advice="leave the task out")


def _check_settings(names: Sequence[str], limit: int | None, num_fewshot: int | None) -> list[str]:
    require_extra("lm_eval", "evaluation on tasks", extra="eval")
    names = list(dict.fromkeys(names))
    if not names or not all(name.strip() for name in names):
        raise InputError("no task is named: give names as in piqa,arc_easy")
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1 example of every task, found {limit}")
    if num_fewshot is not None and num_fewshot < 0:
        raise InputError(f"num_fewshot must not be negative, found {num_fewshot}")
    return names


def _load(manager: Any, name: str, local: LocalTask | None) -> list[Any]:
    problem, advice = (
        f"the data of the task {name} cannot be loaded",
        "run once with a network, or give files with --task-data",
    )
    if local is not None:
        problem, advice = f"{local.evaluated_file}: the task {name} cannot be made of it", ""
    with explaining(problem, advice):
        try:
            loaded = manager.load([name])
        except ImportError as error:
            package = error.name or first_line(error)
            raise InputError(
                f"the task {name} needs the package '{package}': pip install 'svdllm[eval]', or that package alone"
            ) from error
    groups = loaded.get("groups", {})
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def _members(manager: Any, built: list[list[Any]]) -> dict[str, Any]:
    try:
        return manager.load([task for tasks in built for task in tasks])["tasks"]
    except ValueError as error:  # a task by itself and in a group, too
        raise InputError(f"the tasks overlap: {first_line(error)}") from error


def _check_task(name: str, task: Any, num_fewshot: int | None, reporter: Reporter) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(
            f"the task {name} runs code that the model writes, which svdllm does not: use lm_eval itself, in a sandbox"
        )
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"the task {name} has images or sound, these are language models: leave it out")
    if num_fewshot and task.config.num_fewshot == 0:
        reporter.warn(
            f"{name} is defined with 0 examples shown, which the harness keeps: num_fewshot does not change it."
        )


def _chances(members: dict[str, Any], local: dict[str, LocalTask], limit: int | None) -> dict[str, float]:
    """The accuracy of guessing, for tasks with choices. Every prompt of local data is made once, as a check."""
    chances = {}
    for name, task in members.items():
        has_choices = task.OUTPUT_TYPE == "multiple_choice" and task.config.doc_to_choice is not None
        if not has_choices and name not in local:
            continue
        shares = []
        for number, document in enumerate(task.eval_docs, start=1):
            if limit is not None and number > limit:
                break
            where = local[name].evaluated_file if name in local else f"the data of {name}"
            with explaining(f"{where}, example {number}: {name} has no prompt for it"):
                choices = task.doc_to_choice(document) if has_choices else []
                if name in local:
                    _try_prompt(task, document, choices)
            shares += [1 / len(choices)] if choices else []
        if shares:
            chances[name] = sum(shares) / len(shares)
    return chances


def _try_prompt(task: Any, document: Any, choices: list[str]) -> None:
    task.doc_to_text(document)
    answer = task.doc_to_target(document)
    if task.OUTPUT_TYPE == "multiple_choice" and isinstance(answer, int) and not 0 <= answer < len(choices):
        raise ValueError(f"the answer is choice {answer + 1} of {len(choices)}")
