"""Tells models at one place apart: another one may lie at the same path later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from svdllm.common.device import resolve_device, resolve_dtype
from svdllm.comparison.settings import Grid
from svdllm.models.low_rank.lowrank import sha256_of
from svdllm.models.open import Source, open_config
from svdllm.models.safetensors_files import weight_files


def identity_of(grid: Grid) -> dict[str, Any]:
    """The fingerprint of the dense model, and the dtype in which it is measured.

    Raises:
        InputError, UnsupportedModelError, CheckpointError: the model, device or dtype cannot be used.
    """
    source = open_config(grid.model, offline=grid.offline, revision=grid.revision)
    dtype = resolve_dtype(grid.measures.dtype, resolve_device(grid.measures.device), source.dtype)
    return _fingerprint(grid.model, source) | {"measured in": str(dtype)}


def fingerprint_of(model: str, *, offline: bool) -> dict[str, Any]:
    """SHA-256 of the weight files of a model, or the commit of a hub id.

    Raises:
        InputError, UnsupportedModelError, CheckpointError: the model cannot be opened.
    """
    return _fingerprint(model, open_config(model, offline=offline, allow_quantized=True))


def _fingerprint(model: str, source: Source) -> dict[str, Any]:
    files = [source.gguf] if source.gguf is not None else weight_files(Path(model)) if Path(model).is_dir() else []
    return {"weights": [sha256_of(file) for file in files], "commit": source.revision}
