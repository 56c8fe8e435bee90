"""From a budget to ranks, and the exact accounting of what a compressed model holds: tensors, parameters, bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor

import torch
from transformers import PreTrainedModel

from svdllm.allocation import Ranks, fill_budget, uniform_rank, uniform_ranks
from svdllm.config import Recipe
from svdllm.errors import InputError
from svdllm.source import Source
from svdllm.structure import Structure, Target, matches

Tensors = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name -> shape and dtype

# A shard is held in memory while it is written.
SHARD_BYTES = 2 * 10**9

# The dtypes of safetensors, in the order in which its writer lays tensors out.
_CODES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def stored_tensors(source: Source, skeleton: PreTrainedModel) -> Tensors:
    """What the source's files hold, or would hold if only its config is known (tied tensors once)."""
    if source.weights is not None:
        return {name: source.weights.shape_and_dtype(name) for name in source.weights.names()}
    tied = set(getattr(skeleton, "all_tied_weights_keys", None) or ())
    return {
        name: (tuple(tensor.shape), source.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in skeleton.state_dict().items()
        if name not in tied
    }


def compressed_tensors(stored: Tensors, targets: Sequence[Target], ranks: Mapping[str, int]) -> Tensors:
    """What the compressed model's files hold: ``weight`` becomes ``svd_v.weight`` and ``svd_u.weight``."""
    by_name = {target.name: target for target in targets}
    result: Tensors = {}
    for name, (shape, dtype) in stored.items():
        owner, _, leaf = name.rpartition(".")
        if owner not in ranks:
            result[name] = (shape, dtype)
        elif leaf == "weight":
            target, rank = by_name[owner], ranks[owner]
            result[f"{owner}.svd_v.weight"] = ((rank, target.in_features), dtype)
            result[f"{owner}.svd_u.weight"] = ((target.out_features, rank), dtype)
        else:
            result[f"{owner}.svd_u.{leaf}"] = (shape, dtype)
    return result


def num_params(tensors: Tensors) -> int:
    """Floating-point values; what transformers' ``num_parameters`` counts for models without stored buffers."""
    return sum(torch.Size(shape).numel() for shape, dtype in tensors.values() if dtype.is_floating_point)


def tensor_bytes(tensors: Tensors, names: Sequence[str] | None = None) -> int:
    chosen = tensors if names is None else {name: tensors[name] for name in names}
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in chosen.values())


def shard_names(tensors: Tensors, limit: int = SHARD_BYTES) -> list[list[str]]:
    """The names of each shard, in order; the factors of a target stay together."""
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
    return sum(_header_bytes(tensors, names) + tensor_bytes(tensors, names) for names in shard_names(tensors, limit))


def choose_ranks(recipe: Recipe, structure: Structure, stored: Tensors) -> Ranks:
    """The rank of every factorised target; the others stay dense.

    Raises:
        InputError: a pattern matches nothing, a rank would be 0, or the budget cannot be met; says what can.
    """
    targets = structure.targets
    if recipe.ranks is not None:
        return _explicit_ranks(recipe.ranks, targets)
    overridden = _overrides(recipe, targets)
    fixed = {t.name: uniform_rank(t, overridden[t.name], recipe.round_to) for t in targets if overridden.get(t.name)}
    free = [target for target in targets if target.name not in overridden]
    if recipe.ratio is not None:
        assert isinstance(recipe.ratio, float)
        ranks = fixed | uniform_ranks(free, recipe.ratio, recipe.round_to)
    else:
        ranks = fixed | _fill(recipe, structure, stored, free, fixed)
    _require_ranks_above_zero(ranks, targets, recipe)
    if not ranks:
        raise InputError(
            f"The overrides leave all {len(targets)} linears dense: nothing is left to compress. Drop one of "
            f"{', '.join(map(repr, recipe.overrides))}."
        )
    return {target.name: ranks[target.name] for target in targets if target.name in ranks}


@dataclass(frozen=True)
class _Unit:
    """What a whole-model budget is counted in."""

    what: str
    budget: int
    dense: int
    costs: dict[str, int]  # target -> cost of one rank


def _fill(
    recipe: Recipe, structure: Structure, stored: Tensors, free: Sequence[Target], fixed: Mapping[str, int]
) -> Ranks:
    unit = _whole_model_unit(recipe, structure, stored)
    if unit.budget >= unit.dense:
        raise InputError(
            f"{unit.what} {unit.budget:,} is not below what the dense model has ({unit.dense:,}): nothing to compress."
        )
    weights_of = {t.name: t.num_weights * unit.costs[t.name] // (t.in_features + t.out_features) for t in free}
    spent = unit.dense - sum(weights_of.values()) - _saved_by(fixed, structure, unit)
    ranks = fill_budget(free, unit.costs, unit.budget - spent, recipe.round_to)
    if ranks is None:
        least = spent + sum(unit.costs[t.name] * recipe.round_to for t in free if recipe.round_to <= t.break_even_rank)
        raise InputError(
            f"{unit.what} {unit.budget:,} cannot be met: {spent:,} lie outside the compressed linears, and with every "
            f"rank at its least ({recipe.round_to}) the model still has {least:,}. Raise the budget to more than that."
        )
    return ranks


def _saved_by(fixed: Mapping[str, int], structure: Structure, unit: _Unit) -> int:
    by_name = {target.name: target for target in structure.targets}
    dense = {
        n: by_name[n].num_weights * unit.costs[n] // (by_name[n].in_features + by_name[n].out_features) for n in fixed
    }
    return sum(dense[name] - unit.costs[name] * rank for name, rank in fixed.items())


def _whole_model_unit(recipe: Recipe, structure: Structure, stored: Tensors) -> _Unit:
    sizes = {target.name: target.in_features + target.out_features for target in structure.targets}
    if recipe.target_params is not None:
        dense = num_params(stored)
        return _Unit("--target-params", recipe.target_params, dense, sizes)
    assert recipe.target_size is not None
    costs = {name: size * stored[f"{name}.weight"][1].itemsize for name, size in sizes.items()}
    # Headers name every tensor with its shape and offsets; ranks are written with at most as many digits as here.
    widest = compressed_tensors(stored, structure.targets, {t.name: t.break_even_rank for t in structure.targets})
    headers = file_bytes(widest) - tensor_bytes(widest)
    return _Unit("--target-size", recipe.target_size, tensor_bytes(stored) + headers, costs)


def _explicit_ranks(ranks: Mapping[str, int | str], targets: Sequence[Target]) -> Ranks:
    chosen: Ranks = {}
    for pattern, rank in ranks.items():
        matched = [target for target in targets if matches(pattern, target.name)]
        if not matched:
            raise InputError(f"ranks: {pattern!r} matches none of the {len(targets)} linears ({targets[0].name}, ...).")
        for target in matched:
            if rank != "full" and not 1 <= int(rank) <= target.full_rank:
                raise InputError(
                    f"ranks: {pattern!r} asks for rank {rank} of {target.name}, which can have 1 to {target.full_rank}."
                )
            chosen.setdefault(target.name, target.full_rank if rank == "full" else int(rank))
    return chosen


def _overrides(recipe: Recipe, targets: Sequence[Target]) -> dict[str, float]:
    chosen: dict[str, float] = {}
    for pattern, ratio in recipe.overrides.items():
        matched = [target.name for target in targets if matches(pattern, target.name)]
        if not matched:
            raise InputError(
                f"--override {pattern!r} matches none of the {len(targets)} compressed linears "
                f"({targets[0].name}, ...)."
            )
        for name in matched:
            chosen.setdefault(name, ratio)
    return chosen


def _require_ranks_above_zero(ranks: Ranks, targets: Sequence[Target], recipe: Recipe) -> None:
    empty = [target for target in targets if ranks.get(target.name) == 0]
    if empty:
        worst = min(empty, key=lambda t: t.num_weights / (t.in_features + t.out_features))
        highest = 1 - recipe.round_to * (worst.in_features + worst.out_features) / worst.num_weights
        highest = floor(highest * 1e4) / 1e4  # rounded up it would leave rank 0 again
        advice = (
            f"use a ratio of at most {highest:.4f}" if highest > 0 else f"leave it dense with --ignore {worst.name}"
        )
        rounding = f" (ranks are multiples of {recipe.round_to})" if recipe.round_to > 1 else ""
        raise InputError(
            f"The budget leaves rank 0{rounding} for {len(empty)} linears, for instance {worst.name} "
            f"({worst.out_features} x {worst.in_features}): {advice}."
        )


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
    order = list(_CODES)
    names_by_layout = sorted(names, key=lambda name: (order.index(tensors[name][1]), name))
    entries, offset = {}, 0
    for name in names_by_layout:
        shape, dtype = tensors[name]
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":"))
    return 8 + -(-len(text.encode()) // 8) * 8
