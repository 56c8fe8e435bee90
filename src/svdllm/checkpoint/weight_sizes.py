"""Counts the bytes of weight files, quantised or not, from their headers."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from svdllm.models.safetensors_files import read_header, weight_files

# A quantised x.weight is several tensors: x._weight_qdata, x._weight_scale, ... of torchao, x.weight_packed,
# x.weight_scale, ... of compressed-tensors, x.packed_codes and x.packed_scales of an embedding of ours.
QUANTIZED_PREFIXES = ("_weight_", "weight_", "packed_")


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """Bytes of the weight files of a folder: ``files == headers + quantized + other``.

    ``quantized`` are the integers and scales of quantised weights, ``other`` is every other tensor.
    """

    files: int
    headers: int
    quantized: int
    other: int
    other_at_16_bits: int

    @property
    def files_at_16_bits(self) -> int:
        """Bytes of the files if unquantised floating-point tensors were stored in 16 bits."""
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
        for key, (shape, code, size) in header.tensors.items():
            if key.rpartition(".")[2].startswith(QUANTIZED_PREFIXES):
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
