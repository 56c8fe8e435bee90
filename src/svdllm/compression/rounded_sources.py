"""Refuses to round weights again that were rounded from those of an original model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load

from svdllm.checkpoint.report import is_checkpoint, read_report
from svdllm.common.errors import InputError
from svdllm.models.open import Source

CARD = "README.md"


def require_unrounded(source: Source, instead: str = "") -> None:
    """Raises InputError if the weights of a source were rounded from those of an original; names it where it is known.

    Formats that models are published in, such as FP8, pass.

    Args:
        instead: ends the message: what else can be done.
    """
    if (method := source.rounded_by) is None:
        return
    original = None if source.folder is None else original_of(source.folder)
    named = "" if original is None else f" ({original})"
    raise InputError(
        f"{source.name} is quantised already ({method}), and few bits of it would be rounded twice. Use the model that "
        f"it was made of{named}, in 16 or 32 bits{instead}."
    )


def original_of(folder: Path) -> str | None:
    """The model that a folder was made of, by its report or the ``base_model`` of its card; None if neither says."""
    if is_checkpoint(folder):
        return read_report(folder)["source"]["model"]
    if not (folder / CARD).is_file():
        return None
    try:
        base: Any = (metadata_load(folder / CARD) or {}).get("base_model")
    except ValueError:  # a card whose head is not a mapping
        return None
    found = base[0] if isinstance(base, list) and base else base
    return found if isinstance(found, str) else None
