"""Scores of tasks as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from svdllm.cli.console import duration
from svdllm.cli.tables import Titled
from svdllm.evaluation.side_by_side import ModelEvaluation
from svdllm.evaluation.tasks import TaskResults, TaskScore
from svdllm.evaluation.tasks.record import accuracy_average, compare_score
from svdllm.models.model_names import short_name

LEGEND = "±: standard error"
SHARES = (
    "kept: score / dense score; above chance: the same of what exceeds guessing, where the dense model exceeds it by "
    "two standard errors"
)


def tasks_table(evaluations: Sequence[ModelEvaluation]) -> Titled:
    """A row per task: the dense model's score, the compressed one's, and how much of it that is."""
    results = [evaluation.tasks for evaluation in evaluations if evaluation.tasks is not None]
    shown = results[::-1]  # the dense model first
    names = [short_name(result.model) for result in shown]
    if len(set(names)) < len(names):
        names = [result.model for result in shown]
    table = Table(header_style="bold", box=None, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for column in ("task", "metric"):
        table.add_column(column, no_wrap=True)
    for column in ("n", "chance"):
        table.add_column(column, justify="right")
    for name in names:
        table.add_column(name, justify="right", overflow="fold", min_width=len("0.000 ±0.000"))
    for column in ("kept", "above chance") if len(results) == 2 else ():
        table.add_column(column, justify="right")
    for rows in zip(*(result.scores for result in shown), strict=True):
        score = rows[0]
        table.add_row(
            f"{score.task}{f', {score.num_fewshot}-shot' if score.num_fewshot else ''}",
            score.main.name,
            "" if score.num_examples is None else str(score.num_examples),
            _share(score.chance),
            *(_with_error(row.main.value, row.main.stderr) for row in rows),
            *_shares(rows),
        )
    _add_average(table, shown)
    took = ", ".join(f"{name} {duration(result.seconds)}" for name, result in zip(names, shown, strict=True))
    table.caption = f"{LEGEND}; {SHARES}" if len(results) == 2 else LEGEND
    table.caption_justify = "left"
    limit = shown[0].limit
    return f"Tasks{'' if limit is None else f', the first {limit} examples of each'} ({took})", [table]


def _shares(rows: Sequence[TaskScore]) -> list[str]:
    if len(rows) < 2:
        return []
    dense, score = rows
    compared = compare_score(score, dense)
    return [_share(compared.kept), _share(compared.kept_above_chance)]


def _add_average(table: Table, results: Sequence[TaskResults]) -> None:
    averages = [accuracy_average(result.scores) for result in results]
    found = [average for average in averages if average is not None]
    if len(found) < len(results):
        return
    kept = [_share(found[1][0] / found[0][0] if found[0][0] else None), ""] if len(found) == 2 else []
    table.add_row("mean of acc", "", "", "", "", *(_with_error(*average) for average in found), *kept)


def _with_error(value: float, stderr: float | None) -> str:
    shown = f"{value:.3f}" if abs(value) < 1e5 else f"{value:.2e}"
    return shown if stderr is None else f"{shown} ±{stderr:.3f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
