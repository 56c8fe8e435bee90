"""What weights take on disk, quantised or not, counted from the files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from svdllm.common.errors import CheckpointError, first_line
from svdllm.models.safetensors_files import read_header, weight_files


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
        header = read_header(path)
        few_bits = _quantized_keys(header.metadata, path)
        for key, (shape, code, size) in header.tensors.items():
            if key in few_bits:
                quantized += size
            else:
                other += size
                is_float = code.startswith(("F", "BF"))
                other_at_16_bits += min(2 * prod(shape), size) if is_float else size
    return WeightBytes(
        files=total,
        headers=total - quantized - other,
        quantized=quantized,
        other=other,
        other_at_16_bits=other_at_16_bits,
    )


def _quantized_keys(metadata: dict[str, str], path: Path) -> set[str]:
    """The names of the tensors that stand for a weight in few bits, as torchao writes them into the file."""
    keys: set[str] = set()
    try:
        for name in json.loads(metadata.get("tensor_names", "[]")):
            owner, _, leaf = name.rpartition(".")
            keys |= {f"{owner}._{leaf}_{part}" for part in json.loads(metadata[name]).get("_tensor_data_names", [])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"The notes in the header of {path.name} are damaged: {first_line(error)}") from error
    return keys
