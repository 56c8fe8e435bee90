"""Records the scores of a model on tasks, and compares two models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

# The metric that stands for a task, where it is not the first of its definition. SVD-LLM, Table 1, reports BLEU as the
# share of answers nearer to a true reference than to any false one.
MAIN_METRICS = {"truthfulqa_gen": "bleu_acc"}
ABOVE_CHANCE_ERRORS = 2  # the dense model must be above chance by so many standard errors


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure of the harness; ``filter`` names the way in which the answer was extracted from the model's text."""

    name: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """The score of one model on one task.

    main: the metric that stands for the task; ``metrics`` has all of them.
    group: the group of a task that was run as part of one.
    chance: accuracy of guessing in a multiple-choice task, the mean of 1 / number of choices.
    """

    task: str
    version: Any
    main: Metric
    metrics: list[Metric]
    num_examples: int | None
    num_fewshot: int | None
    group: str | None = None
    chance: float | None = None


@dataclass(frozen=True, kw_only=True)
class TaskResults:
    """The scores of one model on all tasks, and the harness's own document of them.

    files: task -> split -> file, rows and SHA-256, of local data.
    """

    model: str
    scores: list[TaskScore]
    limit: int | None
    batch_size: int
    files: dict[str, dict[str, Any]]
    seconds: float
    harness: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return finite(asdict(self))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The score of a compressed model on a task, compared with the dense model.

    kept: score / dense score, as in papers; dense score / score where less is better.
    kept_above_chance: (score - chance) / (dense score - chance), for accuracies of tasks with choices; None where the
        dense model is not above chance by two of its standard errors, because the quotient is noise then.
    """

    task: str
    metric: str
    dense: float
    score: float
    kept: float | None
    kept_above_chance: float | None

    def to_dict(self) -> dict[str, Any]:
        return finite(asdict(self))


def compare_scores(results: TaskResults, dense: TaskResults) -> list[Comparison]:
    """Compares the scores of two models task by task."""
    theirs = {score.task: score for score in dense.scores}
    return [compare_score(score, theirs[score.task]) for score in results.scores]


def compare_score(score: TaskScore, dense: TaskScore) -> Comparison:
    """Compares the scores of two models on one task."""
    return Comparison(
        task=score.task,
        metric=score.main.name,
        dense=dense.main.value,
        score=score.main.value,
        kept=_kept(score, dense),
        kept_above_chance=_kept_above_chance(score, dense),
    )


def accuracy_average(scores: Sequence[TaskScore]) -> tuple[float, float | None] | None:
    """Mean and standard error over the tasks whose main metric is accuracy, as in the paper's tables.

    A group counts once; its members do not count. None for fewer than two such tasks.
    """
    metrics = [score.main for score in scores if score.main.name == "acc" and score.group is None]
    return mean_and_error([(metric.value, metric.stderr) for metric in metrics]) if len(metrics) > 1 else None


def mean_and_error(figures: Sequence[tuple[float, float | None]]) -> tuple[float, float | None]:
    """Mean of independent figures and its standard error; the error is None where that of a figure is unknown."""
    squares = [error**2 for _, error in figures if error is not None]
    mean = math.fsum(value for value, _ in figures) / len(figures)
    return mean, math.sqrt(math.fsum(squares)) / len(figures) if len(squares) == len(figures) else None


def scores_of(harness: dict[str, Any], chances: dict[str, float]) -> list[TaskScore]:
    """Reads the harness's results, in its order: tasks, and groups that have a figure of their own."""
    groups = {task: group for group, tasks in harness.get("group_subtasks", {}).items() for task in tasks}
    scores = []
    for task, row in harness["results"].items():
        metrics = _metrics(row, harness["higher_is_better"].get(task, {}))
        if not metrics:
            continue
        wanted = MAIN_METRICS.get(task)
        scores.append(
            TaskScore(
                task=task,
                version=harness["versions"].get(task),
                main=next((metric for metric in metrics if metric.name == wanted), metrics[0]),
                metrics=metrics,
                num_examples=row.get("sample_len"),
                num_fewshot=harness["n-shot"].get(task),
                group=groups.get(task),
                chance=chances.get(task),
            )
        )
    return scores


def _metrics(row: dict[str, Any], higher_is_better: dict[str, bool]) -> list[Metric]:
    metrics = []
    for key, value in row.items():
        name, comma, filter_name = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = row.get(f"{name}_stderr,{filter_name}")
        metrics.append(
            Metric(
                name=name,
                filter=filter_name,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                higher_is_better=higher_is_better.get(name) is not False,
            )
        )
    return metrics


def _kept(score: TaskScore, dense: TaskScore) -> float | None:
    part, whole = score.main.value, dense.main.value
    if not score.main.higher_is_better:
        part, whole = whole, part
    return part / whole if whole > 0 else None


def _kept_above_chance(score: TaskScore, dense: TaskScore) -> float | None:
    chance, error = dense.chance, dense.main.stderr
    if chance is None or error is None or not dense.main.name.startswith("acc"):
        return None
    above = dense.main.value - chance
    return (score.main.value - chance) / above if above > ABOVE_CHANCE_ERRORS * error else None


def finite(document: Any) -> Any:
    """Replaces NaN and infinity by None in a document, because JSON cannot express them."""
    if isinstance(document, dict):
        return {key: finite(value) for key, value in document.items()}
    if isinstance(document, list):
        return [finite(value) for value in document]
    return None if isinstance(document, float) and not math.isfinite(document) else document
