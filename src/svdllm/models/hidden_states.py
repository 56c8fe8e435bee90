"""Holds the hidden states of a walk, in memory or in a file."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from torch import Tensor

from svdllm.common.disk import allocate
from svdllm.models.shared_state import SharedStates, State, moved


class HiddenStates:
    """Hidden states of a stream (``... x windows x seqlen x hidden``), in memory or in a memory-mapped file.

    ``shared`` holds what the blocks wrote for later blocks.

    Raises:
        OSError: the disk has no room for the file.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, file: Path | None = None):
        self.shared = SharedStates()
        self._parts: list[HiddenStates] = []
        self.file = file
        if file is None:
            self.tensor = torch.empty(shape, dtype=dtype)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            allocate(file, prod(shape) * dtype.itemsize)
            self.tensor = torch.from_file(str(file), shared=True, size=prod(shape), dtype=dtype).view(shape)

    def share(self, batch: int, block: int, entries: State) -> None:
        """Keeps what a block wrote for later blocks, in memory or in files as the hidden states are."""
        self.shared.write(batch, block, moved(entries, self._kept))

    def _kept(self, tensor: Tensor) -> Tensor:
        if self.file is None:
            return tensor.detach().cpu()
        file = self.file.with_name(f"{self.file.name}-shared-{len(self._parts)}")
        self._parts.append(HiddenStates(tuple(tensor.shape), tensor.dtype, file))
        return self._parts[-1].tensor.copy_(tensor)

    def close(self) -> None:
        """Frees the memory and removes the files."""
        self.shared = SharedStates()
        for part in self._parts:
            part.close()
        del self.tensor
        if self.file is not None:
            self.file.unlink(missing_ok=True)
