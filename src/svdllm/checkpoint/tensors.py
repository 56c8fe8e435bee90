"""Counts the tensors, parameters and bytes in a model's files, from shapes and dtypes alone."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from math import prod
from typing import Any

import torch
from transformers import PreTrainedModel

from svdllm.models.open import Source
from svdllm.models.safetensors_files import SAFETENSORS_CODES

Tensors = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name -> shape and dtype
METADATA = {"format": "pt"}  # of every file

# A shard is held in memory while it is written.
SHARD_BYTES = 2 * 10**9


def stored_tensors(source: Source, skeleton: PreTrainedModel) -> Tensors:
    """The tensors in the source's files, tied ones once; from the config where only this is known."""
    if source.weights is not None:
        return {name: source.weights.shape_and_dtype(name) for name in source.weights.names()}
    return loaded_tensors(skeleton, source.dtype)


def loaded_tensors(skeleton: PreTrainedModel, dtype: torch.dtype) -> Tensors:
    """The tensors that files of a model in a dtype have, tied ones once."""
    tied = tied_names(skeleton)
    return {
        name: (tuple(tensor.shape), dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in skeleton.state_dict().items()
        if name not in tied
    }


def tied_names(skeleton: PreTrainedModel) -> set[str]:
    """Names of tensors that are tied to others, and thus in no file."""
    return set(getattr(skeleton, "all_tied_weights_keys", None) or ())


def buffer_names(skeleton: PreTrainedModel) -> set[str]:
    """Names of the tensors of a model that are not parameters, whether its files have them or not."""
    return {name for name, _ in skeleton.named_buffers()}


def num_params(tensors: Tensors, buffers: Collection[str] = ()) -> int:
    """Number of floating-point values, without buffers, as ``num_parameters`` of transformers counts them."""
    parameters = (tensor for name, tensor in tensors.items() if name not in buffers)
    return sum(torch.Size(shape).numel() for shape, dtype in parameters if dtype.is_floating_point)


def tensor_bytes(tensors: Tensors, names: Sequence[str] | None = None) -> int:
    chosen = tensors.values() if names is None else map(tensors.__getitem__, names)
    return sum(prod(shape) * dtype.itemsize for shape, dtype in chosen)


def shard_names(tensors: Tensors, limit: int = SHARD_BYTES) -> list[list[str]]:
    """The names in each shard, in order; the two factors of a linear stay together."""
    shards: list[list[str]] = [[]]
    size = 0
    for unit in _units(tensors):
        unit_bytes = tensor_bytes(tensors, unit)
        if shards[-1] and size + unit_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].extend(unit)
        size += unit_bytes
    return shards


def file_bytes(tensors: Tensors, limit: int = SHARD_BYTES) -> int:
    """Exact size of the safetensors files, headers included."""
    shards = shard_names(tensors, limit)
    return sum(_header_bytes(tensors, names) + tensor_bytes(tensors, names) for names in shards)


def share_of_files(tensors: Tensors, total: int) -> int:
    """An upper limit on the bytes of some tensors, with their entries in headers, in files of ``total`` bytes together.

    The limits add up: with ``empty_files_bytes``, those of all tensors are at least ``file_bytes``, and above it only
    by the digits of a few offsets.
    """
    return tensor_bytes(tensors) + sum(
        len(_json({name: _entry(shape, dtype, total, total)})) - len("{}") + len(",")
        for name, (shape, dtype) in tensors.items()
    )


def empty_files_bytes(total: int) -> int:
    """An upper limit on the bytes of headers without entries, in files of ``total`` bytes together."""
    return most_files(total) * (8 + len(_json({"__metadata__": METADATA})) + 7)


def most_files(total: int) -> int:
    """The largest number of files of ``total`` bytes together: any two in a row hold more than ``SHARD_BYTES``."""
    return 1 if total <= SHARD_BYTES else 1 + 2 * total // SHARD_BYTES


def _units(tensors: Tensors) -> list[list[str]]:
    units: list[list[str]] = []
    for name in tensors:
        pair = name.removesuffix(".svd_u.weight") + ".svd_v.weight"
        if name.endswith(".svd_u.weight") and units and units[-1] == [pair]:
            units[-1].append(name)
        else:
            units.append([name])
    return units


def _header_bytes(tensors: Tensors, names: Sequence[str]) -> int:
    """Length of a safetensors header: the format pads the JSON to a multiple of eight."""
    order = list(SAFETENSORS_CODES)
    entries, offset = {}, 0
    for name in sorted(names, key=lambda name: (order.index(tensors[name][1]), name)):
        shape, dtype = tensors[name]
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = _entry(shape, dtype, offset, end)
        offset = end
    text = _json({"__metadata__": METADATA, **entries})
    return 8 + -(-len(text) // 8) * 8


def _entry(shape: tuple[int, ...], dtype: torch.dtype, start: int, end: int) -> dict[str, Any]:
    return {"dtype": SAFETENSORS_CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
