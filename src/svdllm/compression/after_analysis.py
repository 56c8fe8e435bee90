"""Marks settings that are read after the analysis: runs that differ in nothing else share one."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel


class _Mark:
    """What the marker leaves in the metadata of a field."""


T = TypeVar("T")
AfterAnalysis = Annotated[T, _Mark()]


def settings_after_analysis(model: type[BaseModel]) -> frozenset[str]:
    """The names of the fields of a model that are declared as ``AfterAnalysis[...]``."""
    fields = model.model_fields.items()
    return frozenset(name for name, field in fields if any(isinstance(entry, _Mark) for entry in field.metadata))
