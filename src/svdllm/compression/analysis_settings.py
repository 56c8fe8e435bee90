"""The settings that decide the content of an analysis, beside those of the recipe."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import transformers

from svdllm.common.version import __version__
from svdllm.compression.forms import FORMS, bits_in, corrected_bits
from svdllm.compression.recipe import Recipe
from svdllm.compression.records import Provenance
from svdllm.compression.subject import Subject


def settings_beside_the_recipe(recipe: Recipe, subject: Subject, provenance: Provenance) -> dict[str, Any]:
    """Everything beside the recipe that decides the bytes of the result."""
    device, dtype = subject.placement(recipe)
    config = subject.source.config.to_json_string(use_diff=False)
    return {
        "device": device.type,
        "computed in": str(dtype),
        "weights of the model": provenance.weights_fingerprint,
        "config of the model": hashlib.sha256(config.encode()).hexdigest(),
        "calibration tokens": provenance.calibration_fingerprint,
        "directions of a spectrum": _directions(recipe),
        "narrower MLPs": any(FORMS[name].of_mlps for name in recipe.analysed_forms),
        **({"bits": bits} if (bits := bits_in(recipe.analysed_forms)) else {}),
        **({"corrected bits": bits} if (bits := corrected_bits(recipe.analysed_forms)) else {}),
        "svdllm version": __version__,
        "torch version": torch.__version__,
        "transformers version": transformers.__version__,
    }


def _directions(recipe: Recipe) -> str:
    if not recipe.truncates:
        return "none"
    return "all" if {"packed", "packed-int8"}.intersection(recipe.analysed_forms) else "to break-even"
