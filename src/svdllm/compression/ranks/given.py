"""Ranks that the recipe gives: explicit ones, and those of overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor

from svdllm.common.errors import InputError
from svdllm.compression.ranks.question import Ranks
from svdllm.compression.ranks.uniform import uniform_rank
from svdllm.compression.recipe import Recipe
from svdllm.models.structure import Target


def explicit_ranks(ranks: Mapping[str, int | str], targets: Sequence[Target]) -> Ranks:
    """The ranks of ``Recipe.ranks``, without the targets that stay dense: 'dense', or matched by no pattern.

    Raises:
        InputError: a pattern matches nothing, or asks for a rank that a target cannot have.
    """
    chosen: dict[str, int | str] = {}
    for pattern, rank in ranks.items():
        matched = [target for target in targets if target.matched_by(pattern)]
        if not matched:
            raise InputError(f"ranks: {pattern!r} matches none of the {len(targets)} linears ({targets[0].name}, ...).")
        for target in matched:
            if isinstance(rank, int) and not 1 <= rank <= target.full_rank:
                raise InputError(
                    f"ranks: {pattern!r} asks for rank {rank} of {target.name}, which can have 1 to {target.full_rank}."
                )
            chosen.setdefault(target.name, target.full_rank if rank == "full" else rank)
    return {name: rank for name, rank in chosen.items() if isinstance(rank, int)}


def free_and_fixed(recipe: Recipe, targets: Sequence[Target]) -> tuple[list[Target], Ranks]:
    """The targets whose ranks the allocation chooses, and the ranks that overrides give to others.

    Raises:
        InputError: an override matches nothing, or leaves a target no rank.
    """
    ratios = overridden(recipe, targets)
    fixed = {t.name: uniform_rank(t, ratios[t.name], recipe.round_to) for t in targets if ratios.get(t.name)}
    require_ranks_above_zero(fixed, targets, recipe)
    return [target for target in targets if target.name not in ratios], fixed


def overridden(recipe: Recipe, targets: Sequence[Target]) -> dict[str, float]:
    """The ratios of ``Recipe.overrides``, by target; 0 leaves it dense. Raises InputError if one matches nothing."""
    chosen: dict[str, float] = {}
    for pattern, ratio in recipe.overrides.items():
        matched = [target.name for target in targets if target.matched_by(pattern)]
        if not matched:
            raise InputError(
                f"--override {pattern!r} matches none of the {len(targets)} compressed linears "
                f"({targets[0].name}, ...)."
            )
        for name in matched:
            chosen.setdefault(name, ratio)
    return chosen


def require_ranks_above_zero(ranks: Ranks, targets: Sequence[Target], recipe: Recipe) -> None:
    """Raises InputError if a target has rank 0; says up to which ratio none has."""
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
