"""Records the settings of unfinished work, and refuses to go on with others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svdllm.common.errors import InputError

FINGERPRINT_FILE = "analysis.json"


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads the settings of an analysis folder; empty if a run was killed before it wrote them."""
    file = folder / FINGERPRINT_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Describes each setting in which two runs differ; "" where there is none."""
    keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    return "; ".join(f"{key} was {_short(found.get(key))}, is now {_short(wanted.get(key))}" for key in keys)


def refuse_other_settings(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Raises InputError if two runs differ in a setting; names each of them."""
    if different := differences(found, wanted):
        raise InputError(
            f"An unfinished run in {folder} had other settings: {different}. Repeat it with the old settings to go on, "
            "or start over with --no-resume."
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
