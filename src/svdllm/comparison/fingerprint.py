"""What a model is beyond its name: another one may lie at the same path later."""

from __future__ import annotations

from typing import Any

from svdllm.common.device import resolve_device, resolve_dtype
from svdllm.comparison.settings import Grid
from svdllm.models.low_rank.lowrank import sha256_of
from svdllm.models.open import open_config
from svdllm.models.safetensors_files import weight_files


def identity_of(grid: Grid) -> dict[str, Any]:
    """SHA-256 of the weight files, or the commit of a hub model, and the dtype in which it is measured.

    Raises:
        InputError, UnsupportedModelError, CheckpointError: the model, device or dtype cannot be used.
    """
    source = open_config(grid.model, offline=grid.offline, revision=grid.revision)
    files = (
        [source.gguf]
        if source.gguf is not None
        else weight_files(source.folder)
        if source.weights and source.folder
        else []
    )
    dtype = resolve_dtype(grid.measures.dtype, resolve_device(grid.measures.device), source.dtype)
    return {"weights": [sha256_of(file) for file in files], "commit": source.revision, "measured in": str(dtype)}
