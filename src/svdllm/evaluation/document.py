"""Makes a document of evaluations, and stores it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svdllm.common.errors import InputError
from svdllm.common.files import write_atomically
from svdllm.evaluation.side_by_side import ModelEvaluation, perplexity_rows
from svdllm.evaluation.tasks import compare_scores

DOCUMENT = "evaluation.json"
ROLES = ("model", "base")


def evaluation_document(evaluations: Sequence[ModelEvaluation]) -> dict[str, Any]:
    """Makes a document of all measurements: of the model, and of the dense model if it comes second."""
    results = [evaluation.tasks for evaluation in evaluations if evaluation.tasks is not None]
    return {
        "results": [row.to_dict() for row in perplexity_rows(evaluations)],
        "tasks": [result.to_dict() for result in results],
        "comparison": [row.to_dict() for row in compare_scores(*results)] if len(results) == 2 else [],
    }


def store_evaluation(document: dict[str, Any], place: Path) -> None:
    """Writes the document into a ``.json`` file, or into a folder, with the harness's documents in separate files."""
    if place.suffix.lower() == ".json":
        _write(place, document)
        return
    own = [{key: value for key, value in tasks.items() if key != "harness"} for tasks in document["tasks"]]
    _write(place / DOCUMENT, document | {"tasks": own})
    for role, tasks in zip(ROLES, document["tasks"], strict=False):
        _write(place / f"lm-eval-{role}.json", tasks["harness"])


def _write(file: Path, document: Any) -> None:
    if file.exists():
        raise InputError(f"{file} exists; nothing is overwritten.")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())
