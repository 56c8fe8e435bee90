"""The weights of a checkpoint with the tensors that finished stages have trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from svdllm.common.errors import NumericalError
from svdllm.models.weights import Weights


class TrainedWeights:
    """Weights in which trained tensors take the place of the first ones, in the dtypes of the first ones.

    ``files`` hold the trained tensors; if a tensor is in several files, the last one counts.
    """

    def __init__(self, first: Weights, files: Sequence[Path]):
        self._first = first
        self._later: dict[str, Path] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                self._later |= dict.fromkeys(file.keys(), path)

    def names(self) -> list[str]:
        return self._first.names()

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return self._first.shape_and_dtype(name)

    def get(self, name: str) -> Tensor:
        if name not in self._later:
            return self._first.get(name)
        dtype = self.shape_and_dtype(name)[1]
        with safe_open(self._later[name], framework="pt") as file:
            stored = file.get_tensor(name).to(dtype, copy=True)
        if not bool(torch.isfinite(stored).all()):
            raise NumericalError(f"{name} overflows {dtype} after training. Start over with a lower --lr.")
        return stored
