"""Grids: many compressed models of one dense model, measured alike (the paper's tables and sensitivity studies)."""

from __future__ import annotations

from svdllm.comparison.run import run_grid
from svdllm.comparison.settings import Grid, Measures, Variant
from svdllm.comparison.studies import STUDIES, Study, find_study, study
from svdllm.comparison.variants import METHOD_NAMES, variants_of

__all__ = [
    "METHOD_NAMES",
    "STUDIES",
    "Grid",
    "Measures",
    "Study",
    "Variant",
    "find_study",
    "run_grid",
    "study",
    "variants_of",
]
