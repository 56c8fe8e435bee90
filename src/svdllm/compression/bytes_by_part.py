"""Counts the bytes of a compressed model's weight files by what they hold."""

from __future__ import annotations

from collections.abc import Mapping

from svdllm.checkpoint.tensors import Tensors, file_bytes, tensor_bytes
from svdllm.compression.forms.bits import BASE
from svdllm.models.structure import Structure

PARTS = ("embedding", "head", "linears", "corrections", "scales", "other", "headers")
FACTORS = (".svd_u", ".svd_v")


def bytes_by_part(written: Tensors, structure: Structure) -> dict[str, int]:
    """The bytes of the embedding, an untied head, the blocks' linears, their corrections and scales, and the rest.

    Embedding, head and corrections are counted with their scales. The parts add up to the bytes of the files.
    """
    parts: dict[str, int] = dict.fromkeys(PARTS, 0)
    outside = {target.name: target.vocabulary for target in structure.vocabulary}
    linears = {name for target in structure.targets for name in target.linears}
    corrected = {name.removesuffix(f".{BASE}weight_packed") for name in written}
    for name in written:
        parts[_part_of(name, outside, linears, corrected)] += tensor_bytes(written, [name])
    parts["headers"] = file_bytes(written) - tensor_bytes(written)
    return parts


def bits_per_weight(parts: Mapping[str, int], structure: Structure) -> float:
    """The bits that a weight of the targets takes, with its share of the scales, by ``bytes_by_part``."""
    return 8 * (parts["linears"] + parts["corrections"] + parts["scales"]) / max(1, structure.num_target_params)


def _part_of(name: str, outside: dict[str, str], linears: set[str], corrected: set[str]) -> str:
    module, _, leaf = name.rpartition(".")
    owner = module
    if owner in outside:
        return outside[owner]
    if owner not in linears:
        owner = owner.rpartition(".")[0]  # of a factor
    if owner not in linears or leaf == "bias":
        return "other"
    if owner in corrected and module.endswith(FACTORS):
        return "corrections"
    return "scales" if leaf == "weight_scale" else "linears"
