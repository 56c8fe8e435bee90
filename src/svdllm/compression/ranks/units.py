"""The unit of a budget: parameters, bytes of the weight files, or nanoseconds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import floor

from svdllm.common.errors import InputError
from svdllm.compression.forms.layout import params, params_beside_biases
from svdllm.compression.ranks.linear_times import LinearTimes
from svdllm.compression.ranks.predicted_sizes import WrittenFiles
from svdllm.compression.ranks.question import TimeUnit, Unit
from svdllm.compression.ranks.uniform import exact_floor
from svdllm.compression.recipe import Recipe
from svdllm.models.chosen import Chosen, Forms
from svdllm.models.structure import Structure, Target


def unit_of_size(recipe: Recipe, files: WrittenFiles, free: Sequence[Target], fixed: Forms) -> Unit:
    """The unit of ``ratio``, ``target_params`` or ``target_size``; ``free`` is everything that it pays for.

    Raises InputError if the dense model fits in it.
    """
    if recipe.ratio is not None:
        assert isinstance(recipe.ratio, float)
        weights = sum(target.num_weights for target in free)
        return Unit("The ratio's share of parameters,", exact_floor((1 - recipe.ratio) * weights), 0, params)
    if recipe.target_size is not None:
        return _bytes(recipe, recipe.target_size, files, free, fixed)
    assert recipe.target_params is not None
    what, budget, dense = "--target-params", recipe.target_params, files.num_params({})
    _require_below(what, budget, dense, "has")
    outside = files.num_params(fixed) - sum(target.num_weights for target in free)
    return Unit(what, budget, outside, params_beside_biases)


def unit_of_time(
    recipe: Recipe, structure: Structure, free: Sequence[Target], fixed: Forms, times: LinearTimes
) -> TimeUnit:
    """The unit of ``target_speedup``."""
    assert recipe.target_speedup is not None
    dense = times.total(structure.targets, {})
    outside = times.total(structure.targets, fixed) - sum(times.of(target, None) for target in free)
    budget = floor(dense / recipe.target_speedup)
    return TimeUnit(f"--target-speedup {recipe.target_speedup:g}", budget, outside, times.of, times, dense)


def _bytes(recipe: Recipe, budget: int, files: WrittenFiles, free: Sequence[Target], fixed: Forms) -> Unit:
    what, bits = "--target-size", "" if recipe.factor_bits is None else f" in {recipe.factor_bits} bits"
    _require_below(what, budget, files.num_bytes({}), f"has{bits}")
    parts = {target.name: files.part(target) for target in free}

    @cache
    def cost(target: Target, chosen: Chosen | None) -> int:
        return parts[target.name].share({} if chosen is None else {target.name: chosen}, budget)

    outside = files.most_bytes(fixed, budget) - sum(cost(target, None) for target in free)
    return Unit(what, budget, outside, cost)


def _require_below(what: str, budget: int, dense: int, has: str) -> None:
    if budget >= dense:
        raise InputError(f"{what} {budget:,} is not below what the dense model {has} ({dense:,}): nothing to compress.")
