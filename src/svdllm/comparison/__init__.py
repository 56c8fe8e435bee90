"""Comparisons: many models made from one dense model, measured alike (the paper's tables and sensitivity studies)."""

from __future__ import annotations

from svdllm.comparison.compressed import Compressed, Trained
from svdllm.comparison.foreign import Foreign
from svdllm.comparison.run import run_grid
from svdllm.comparison.settings import Grid, Measures
from svdllm.comparison.simulated.variants import SIMULATED_SYSTEMS
from svdllm.comparison.studies import STUDIES, Study, find_study, study
from svdllm.comparison.variant import MadeBy, Variant
from svdllm.comparison.variants import VARIANTS, variants_of

__all__ = [
    "SIMULATED_SYSTEMS",
    "STUDIES",
    "VARIANTS",
    "Compressed",
    "Foreign",
    "Grid",
    "MadeBy",
    "Measures",
    "Study",
    "Trained",
    "Variant",
    "find_study",
    "run_grid",
    "study",
    "variants_of",
]
