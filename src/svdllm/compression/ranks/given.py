"""Forms that the recipe gives: explicit ones, and those of overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor

from svdllm.common.errors import InputError
from svdllm.compression.forms import FORMS, factors_of
from svdllm.compression.forms.layout import params
from svdllm.compression.ranks.uniform import uniform_rank
from svdllm.compression.recipe import Recipe
from svdllm.models.chosen import Chosen, Forms
from svdllm.models.linears import matches
from svdllm.models.structure import Structure, Target

# A rank, "full" or "dense", or a form and its size, as in {"packed": 96}.
Given = int | str | Mapping[str, int]


def explicit_forms(given: Mapping[str, Given], structure: Structure) -> dict[str, Chosen]:
    """The forms of ``Recipe.ranks``, without the targets that stay dense: 'dense', or matched by no pattern.

    The first match of a target decides. A pattern for ``narrow`` is searched in the names of MLPs.

    Raises:
        InputError: a pattern matches nothing, or asks for a form or size that a target cannot have.
    """
    chosen: dict[str, Chosen | None] = {}
    for pattern, wanted in given.items():
        if isinstance(wanted, Mapping) and FORMS[next(iter(wanted))].of_mlps:
            matched = [target for mlp in _matched_mlps(pattern, structure) for target in mlp]
        else:
            in_bits = isinstance(wanted, Mapping) and FORMS[next(iter(wanted))].bits is not None
            able = structure.stored if in_bits else structure.targets
            matched = [target for target in able if target.matched_by(pattern)]
        if not matched:
            example = structure.targets[0].name
            raise InputError(
                f"ranks: {pattern!r} matches none of the {len(structure.targets)} linears ({example}, ...)."
            )
        for target in matched:
            chosen.setdefault(target.name, _given(pattern, wanted, target))
    forms = {name: single for name, single in chosen.items() if single is not None}
    _require_whole_mlps(forms, structure)
    return forms


def _given(pattern: str, wanted: Given, target: Target) -> Chosen | None:
    if wanted == "dense":
        return None
    if isinstance(wanted, Mapping):
        ((name, size),) = wanted.items()
        sizes = FORMS[name].sizes(target, 1)
        if size in sizes:
            return Chosen(name, size)
        can = "cannot have this form; give it another, or dense (--skip of quantize)"
        if sizes:
            each = ", ".join(map(str, sizes)) if FORMS[name].bits else f"1 to {sizes[-1]}"
            can = f"can have {each}"
        raise InputError(f"ranks: {pattern!r} asks for {name} {size} of {target.name}, which {can}.")
    if isinstance(wanted, int) and not 1 <= wanted <= target.full_rank:
        raise InputError(
            f"ranks: {pattern!r} asks for rank {wanted} of {target.name}, which can have 1 to {target.full_rank}."
        )
    return Chosen("pair", wanted if isinstance(wanted, int) else target.full_rank)


def _matched_mlps(pattern: str, structure: Structure) -> list[list[Target]]:
    members = structure.mlp_targets
    if not members:
        raise InputError(
            f"ranks: {pattern!r} asks for a narrower MLP, and this model has none that can be narrowed "
            "(docs/method.md); give its linears ranks."
        )
    found = [targets for name, targets in members.items() if matches(pattern, name)]
    if not found:
        raise InputError(f"ranks: {pattern!r} matches none of the {len(members)} MLPs ({next(iter(members))}, ...).")
    return found


def _require_whole_mlps(forms: Forms, structure: Structure) -> None:
    """Raises InputError if some linears of an MLP are narrowed, and others are not, or to another width."""
    for name, targets in structure.mlp_targets.items():
        own = {forms.get(target.name) for target in targets}
        narrowed = any(chosen is not None and FORMS[chosen.form].of_mlps for chosen in own)
        if narrowed and len(own) > 1:
            raise InputError(
                f"ranks: {name} is narrowed as a whole, but an earlier pattern gives one of its linears another form. "
                "Put the pattern of the MLP first, or leave the linear out."
            )


def free_and_fixed(recipe: Recipe, targets: Sequence[Target]) -> tuple[list[Target], dict[str, Chosen]]:
    """The targets whose forms the allocation chooses, and the forms that overrides give to others.

    Raises:
        InputError: an override matches nothing, or leaves a target no rank.
    """
    ratios = overridden(recipe, targets)
    forms = recipe.used_forms
    fixed = {
        t.name: Chosen(factors_of(t, forms).name, uniform_rank(t, ratios[t.name], recipe.round_to, forms))
        for t in targets
        if ratios.get(t.name)
    }
    require_sizes_above_zero(fixed, targets, recipe)
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


def require_sizes_above_zero(forms: Forms, targets: Sequence[Target], recipe: Recipe) -> None:
    """Raises InputError if a target has size 0; says up to which ratio none has."""
    empty = [target for target in targets if target.name in forms and forms[target.name].size == 0]
    if empty:
        form = forms[empty[0].name].form

        def highest_of(target: Target) -> float:
            return 1 - params(target, Chosen(form, recipe.round_to)) / target.num_weights

        worst = min(empty, key=highest_of)
        highest = floor(highest_of(worst) * 1e4) / 1e4  # rounded up it would leave rank 0 again
        advice = (
            f"use a ratio of at most {highest:.4f}" if highest > 0 else f"leave it dense with --ignore {worst.name}"
        )
        rounding = f" (ranks are multiples of {recipe.round_to})" if recipe.round_to > 1 else ""
        raise InputError(
            f"The budget leaves rank 0{rounding} for {len(empty)} linears, for instance {worst.name} "
            f"({worst.out_features} x {worst.in_features}): {advice}."
        )
