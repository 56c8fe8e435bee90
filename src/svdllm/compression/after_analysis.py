"""Marks the settings that are read after the analysis. Runs that differ in no other setting share one analysis."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel


class _Mark:
    """The metadata of a field that is marked."""


T = TypeVar("T")
AfterAnalysis = Annotated[T, _Mark()]


def settings_after_analysis(model: type[BaseModel]) -> frozenset[str]:
    """The names of the fields of a model that are declared as ``AfterAnalysis[...]``."""
    fields = model.model_fields.items()
    return frozenset(name for name, field in fields if any(isinstance(entry, _Mark) for entry in field.metadata))
