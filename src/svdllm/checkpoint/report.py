"""Reads the report of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svdllm.common.errors import CheckpointError, InputError
from svdllm.models.low_rank.lowrank import read_object

REPORT_FILE = "svdllm/report.json"


def read_report(folder: Path) -> dict[str, Any]:
    """Reads the report of a checkpoint.

    ``ratio`` is what was asked for (None with another budget) and ``achieved_ratio`` what was reached. Reports of
    version 0.1 have the second under the name of the first; they are returned in today's form.

    Raises:
        InputError: the folder is not a checkpoint of this library.
    """
    file = Path(folder) / REPORT_FILE
    if not file.is_file():
        raise InputError(
            f"{folder} is not an svdllm checkpoint: it has no {REPORT_FILE}. Make one with `svdllm compress`."
        )
    try:
        report = read_object(file)
    except ValueError as error:
        raise CheckpointError(f"{folder} cannot be read: {error} Fetch or write it again.") from error
    if not {"linears", "source", "recipe", "params"} <= report.keys():
        raise CheckpointError(f"{REPORT_FILE} in {folder} is damaged: entries are missing.")
    if "achieved_ratio" not in report:
        report |= {"achieved_ratio": report.get("ratio"), "ratio": report["recipe"].get("ratio")}
    return report


def ranks_of(report: Mapping[str, Any]) -> dict[str, int]:
    """Reads the rank of every factorised linear from the report of a checkpoint."""
    rows = [row for row in report["linears"] if row["rank"] is not None]
    return {name: row["rank"] for row in rows for name in row.get("parts") or [row["name"]]}


def form_of(row: Mapping[str, Any]) -> str:
    """The form of a linear in a report; reports of 0.1 know pairs and dense linears."""
    return row.get("form") or ("dense" if row["rank"] is None else "pair")


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a folder has a report, as every checkpoint of svdllm does."""
    return (Path(folder) / REPORT_FILE).is_file()


def holds_checkpoints(folder: Path) -> bool:
    """Whether a folder is a checkpoint, or has one for each ratio in it."""
    return is_checkpoint(folder) or (folder.is_dir() and any(map(is_checkpoint, folder.glob("ratio-*"))))
