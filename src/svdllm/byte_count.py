"""What weights take on disk, quantised or not, counted from the files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from svdllm.layout import SAFETENSORS_CODES
from svdllm.weights import weight_files

_DTYPES = {code: dtype for dtype, code in SAFETENSORS_CODES.items()}


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """Bytes of the weight files of a folder: ``files == headers + quantized + other``.

    ``quantized`` are the integers of weights in few bits, with their scales; ``other`` is every other tensor.
    """

    files: int
    headers: int
    quantized: int
    other: int
    other_at_16_bits: int

    @property
    def files_at_16_bits(self) -> int:
        """If the floating-point tensors that are not quantised were stored in bfloat16 or float16."""
        return self.files - self.other + self.other_at_16_bits


def weight_bytes(folder: str | Path) -> WeightBytes:
    """Counts the safetensors files of a model folder, from their headers.

    Raises:
        InputError, CheckpointError: the folder has no such files, or one is missing.
    """
    quantized = other = other_at_16_bits = 0
    paths = weight_files(Path(folder))
    total = sum(path.stat().st_size for path in paths)
    for path in paths:
        with safe_open(path, framework="pt") as file:
            few_bits = _quantized_keys(file.metadata() or {})
            for key in file.keys():  # noqa: SIM118
                entry = file.get_slice(key)
                dtype, numel = _DTYPES[entry.get_dtype()], torch.Size(entry.get_shape()).numel()
                size = numel * dtype.itemsize
                if key in few_bits:
                    quantized += size
                else:
                    other += size
                    other_at_16_bits += numel * min(2, dtype.itemsize) if dtype.is_floating_point else size
    return WeightBytes(
        files=total,
        headers=total - quantized - other,
        quantized=quantized,
        other=other,
        other_at_16_bits=other_at_16_bits,
    )


def _quantized_keys(metadata: dict[str, str]) -> set[str]:
    """The names of the tensors that stand for a weight in few bits, as torchao writes them into the file."""
    keys: set[str] = set()
    for name in json.loads(metadata.get("tensor_names", "[]")):
        owner, _, leaf = name.rpartition(".")
        keys |= {f"{owner}._{leaf}_{part}" for part in json.loads(metadata[name]).get("_tensor_data_names", [])}
    return keys
