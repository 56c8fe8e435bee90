"""Reads the data of tasks from a folder instead of the hub, and turns it into the columns of the hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from svdllm.common.errors import InputError, explaining
from svdllm.data.sources import rows_of_spec
from svdllm.data.specs import FileSpec
from svdllm.evaluation.tasks.formats import FORMATS, Row

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
# Files named by their authors, without a split: they are the split that the task is evaluated on.
WITHOUT_SPLIT = {"truthfulqa_gen": "truthfulqa.csv"}


@dataclass(frozen=True)
class TaskFile:
    """A split of a task, with rows in the columns of the hub."""

    path: Path
    rows: list[dict[str, Any]]


def find_files(folder: Path, task: str, splits: Sequence[str], evaluated: str) -> dict[str, Path]:
    """Finds the file of each split of a task: ``TASK.SPLIT.SUFFIX``; more letters may follow SPLIT.

    Raises:
        InputError: there is no such folder, a split has two files, a file is of no split, or ``evaluated`` has no file.
    """
    if not folder.is_dir():
        raise InputError(f"--task-data {folder} is not a folder; expected one with files like {task}.{evaluated}.jsonl")
    found: dict[str, Path] = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES):
        split = _split_of(path, task, splits, evaluated)
        if split is None:
            continue
        if split in found:
            raise InputError(f"{found[split]} and {path} are both the split {split} of {task}: keep one of them there")
        found[split] = path
    require_split(found, folder, task, evaluated, "is evaluated on")
    return found


def require_split(found: dict[str, Path], folder: Path, task: str, split: str, why: str) -> None:
    """Raises InputError if a needed split has no file."""
    if split not in found:
        or_else = f" or {WITHOUT_SPLIT[task]}" if task in WITHOUT_SPLIT else ""
        raise InputError(
            f"{task} {why} its split {split}, of which {folder} has no file: expected {task}.{split}.jsonl (or .json, "
            f".csv, .parquet){or_else}"
        )


def read_file(path: Path, task: str) -> TaskFile:
    """Reads the rows of a file; messages count rows from 1.

    Raises:
        InputError: the file cannot be read, a column is missing or of the wrong type; names the row and the columns.
    """
    rows = (
        _csv_rows(path)
        if path.suffix.lower() == ".csv"
        else rows_of_spec(FileSpec(path=path), evaluation=True, offline=True)
    )
    if not rows:
        raise InputError(f"{path} has no rows")
    if task not in FORMATS:
        _require_alike(path, rows)
        return TaskFile(path, rows)
    wanted = _format(path, FORMATS[task], rows[0])
    return TaskFile(path, [_checked(path, wanted, number, row) for number, row in enumerate(rows, start=1)])


def _split_of(path: Path, task: str, splits: Sequence[str], evaluated: str) -> str | None:
    if path.name.lower() == WITHOUT_SPLIT.get(task):
        return evaluated
    if not path.name.startswith(f"{task}."):
        return None
    middle = path.stem[len(task) + 1 :]
    fitting = [split for split in splits if middle.startswith(split)]
    if not fitting:
        raise InputError(
            f"{path}: {task} has no split '{middle}', it has {', '.join(splits)}: rename the file, as in "
            f"{task}.{evaluated}{path.suffix}"
        )
    return max(fitting, key=len)


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a CSV file in UTF-8: {error}") from error
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise InputError(f"{path}, row {number}: expected as many cells as in the first line: {', '.join(rows[0])}")
    return rows


def _format(path: Path, formats: Sequence[type[Row]], first: dict[str, Any]) -> type[Row]:
    """Finds the format whose columns the first row has."""
    for row in formats:
        if row.required() <= first.keys():
            return row
    nearest = max(formats, key=lambda row: len(row.required() & first.keys()))
    missing = sorted(nearest.required() - first.keys())
    expected = ", or ".join(", ".join(row.columns()) for row in formats)
    raise InputError(
        f"{path}, row 1: no column {', '.join(map(repr, missing))}; expected columns {expected}; "
        f"found {', '.join(map(str, first))}"
    )


def _checked(path: Path, wanted: type[Row], number: int, row: dict[str, Any]) -> dict[str, Any]:
    try:
        return wanted.model_validate(row).hub()
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "missing":
            what = f"no column '{where}'"
        else:
            shown = repr(problem["input"])
            found = "" if problem["type"] == "value_error" else f", found {shown[:80]}"
            what = (f"column '{where}': " if where else "") + problem["msg"].removeprefix("Value error, ") + found
        raise InputError(
            f"{path}, row {number}: {what}; expected columns {', '.join(wanted.columns())}; "
            f"found {', '.join(map(str, row))}"
        ) from error


def _require_alike(path: Path, rows: list[dict[str, Any]]) -> None:
    for number, row in enumerate(rows, start=1):
        with explaining(f"{path}, row {number}: a text is cut within a character"):
            json.dumps(row, ensure_ascii=False, default=str).encode()
        if row.keys() != rows[0].keys():
            raise InputError(
                f"{path}, row {number}: expected the columns of row 1, {', '.join(rows[0])}; found {', '.join(row)}"
            )
