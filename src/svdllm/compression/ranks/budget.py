"""From a budget to forms and sizes."""

from __future__ import annotations

from dataclasses import replace

from svdllm.checkpoint.quantized import NVFP4_GROUP
from svdllm.checkpoint.tensors import Tensors, file_bytes, tensor_bytes
from svdllm.common.errors import InputError
from svdllm.compression.forms import FORMS
from svdllm.compression.forms.bits import group_size_of
from svdllm.compression.forms.layout import elastic_tensors
from svdllm.compression.ranks import ALLOCATIONS
from svdllm.compression.ranks.given import explicit_forms, free_and_fixed, overridden, require_sizes_above_zero
from svdllm.compression.ranks.linear_times import LinearTimes
from svdllm.compression.ranks.pools import Pools, probed_members
from svdllm.compression.ranks.predicted_sizes import WrittenFiles
from svdllm.compression.ranks.question import Allocation, Evidence, Question, Unit
from svdllm.compression.ranks.uniform import exact_floor, fill_budget, uniform_rank, uniform_ranks
from svdllm.compression.ranks.units import unit_of_size, unit_of_time
from svdllm.compression.recipe import Recipe
from svdllm.models.chosen import Chosen, Forms
from svdllm.models.structure import Structure, Target


def choose_forms(
    recipe: Recipe, structure: Structure, files: WrittenFiles, evidence: Evidence | None = None
) -> Allocation:
    """The form and size of every compressed target; the others stay dense.

    ``files`` compute the size of the weight files for given forms: as written, or quantised. Without ``evidence``,
    uniform ranks stand in for the forms of an allocation that needs spectra.

    Raises:
        InputError: a pattern matches nothing, a rank would be 0, or the budget cannot be met; says what can.
    """
    targets = structure.targets
    if recipe.ranks is not None:
        return Allocation(explicit_forms(recipe.ranks, structure))
    free, fixed = free_and_fixed(recipe, targets)
    row = ALLOCATIONS[recipe.allocation]
    known = evidence is not None or not row.needs_spectra
    if recipe.target_speedup is not None and not known:
        chosen = Allocation(_about(free, recipe.target_speedup))
    else:
        pools = Pools.of(free if recipe.expert_ranks == "equal" else (), structure)
        question = pools.asked(_question(recipe, structure, files, free, fixed, evidence))
        if row.leaves_dense:
            question.require_met(row.least(question, recipe))
        found = pools.known(probed_members(evidence or Evidence(), structure))
        chosen = row.allocate(question, found, recipe) if known else _stand_in(question, recipe)
        chosen = replace(chosen, forms=pools.of_members(chosen.forms))
    forms = fixed | dict(chosen.forms)
    require_sizes_above_zero(forms, targets, recipe)
    if not forms:
        raise InputError(
            f"The overrides leave all {len(targets)} linears dense: nothing is left to compress. Drop one of "
            f"{', '.join(map(repr, recipe.overrides))}."
        )
    return replace(chosen, forms={t.name: forms[t.name] for t in structure.stored if t.name in forms})


def require_places(recipe: Recipe, structure: Structure) -> None:
    """Raises InputError if a form that the recipe names has no place in the model; one by default is left out."""
    for name in recipe.forms or ():
        if FORMS[name].of_mlps and not structure.mlp_targets:
            raise InputError(
                f"--forms {name} needs MLPs whose inner features are an elementwise function of linears and feed one "
                f"linear alone; this model has none that may be compressed whole. Leave {name} out."
            )


def require_fast_enough(recipe: Recipe, structure: Structure, times: LinearTimes) -> None:
    """Raises InputError if not even the least sizes are as fast as ``target_speedup``; says what is."""
    free, fixed = free_and_fixed(recipe, structure.targets)
    question = _asked(recipe, structure, free, unit_of_time(recipe, structure, free, fixed, times))
    question = Pools.of(free if recipe.expert_ranks == "equal" else (), structure).asked(question)
    question.require_met(ALLOCATIONS[recipe.allocation].least(question, recipe))


def spare_forms(recipe: Recipe, structure: Structure, forms: Forms) -> dict[str, Chosen]:
    """The largest pair that an allocation may give, at a higher ratio, to each linear that it leaves dense here.

    Linears that an override leaves dense are dense at every ratio, and not in the result.
    """
    by_override = overridden(recipe, structure.targets)
    spare = {t.name: t.break_even_rank // recipe.round_to * recipe.round_to for t in structure.targets}
    return {
        name: Chosen("pair", rank)
        for name, rank in spare.items()
        if rank and name not in forms and name not in by_override
    }


def elastic_bytes(recipe: Recipe, structure: Structure, stored: Tensors, forms: Forms, known: bool) -> int:
    """Exact size of the elastic files; 0 without any.

    If the forms are not ``known`` yet, an upper bound: the linears that stay dense take no more than the budget.
    """
    if not recipe.elastic:
        return 0
    if known:
        return file_bytes(elastic_tensors(structure, stored, spare_forms(recipe, structure, forms)))
    if not ALLOCATIONS[recipe.allocation].leaves_dense:
        return file_bytes(elastic_tensors(structure, stored, {}))
    assert isinstance(recipe.ratio, float)
    most = elastic_tensors(structure, stored, spare_forms(recipe, structure, {}))
    itemsize = max(stored[f"{target.linears[0]}.weight"][1].itemsize for target in structure.targets)
    budget = exact_floor((1 - recipe.ratio) * structure.num_target_params) * itemsize
    factors = tensor_bytes(most) - tensor_bytes(elastic_tensors(structure, stored, {}))
    return file_bytes(most) - max(0, factors - budget)


def _question(
    recipe: Recipe,
    structure: Structure,
    files: WrittenFiles,
    free: list[Target],
    fixed: Forms,
    evidence: Evidence | None,
) -> Question:
    if evidence is not None and evidence.times is not None:
        unit = unit_of_time(recipe, structure, free, fixed, evidence.times)
    else:
        unit = unit_of_size(recipe, files, [*free, *structure.vocabulary], fixed)
    return _asked(recipe, structure, free, unit)


def _asked(recipe: Recipe, structure: Structure, free: list[Target], unit: Unit) -> Question:
    """The question of a recipe; an MLP of which an override fixes a linear is not narrowed."""
    assert not isinstance(recipe.ratio, tuple)
    names = {target.name for target in free}
    mlps = {
        name: members for name, members in structure.mlp_targets.items() if names.issuperset(t.name for t in members)
    }
    return Question(
        free, unit, recipe.used_forms, mlps, recipe.round_to, recipe.ratio, structure.vocabulary, recipe.joins
    )


def _about(free: list[Target], speedup: float) -> dict[str, Chosen]:
    """Uniform ranks of about the size that a speed-up needs: as if time were parameters."""
    ratio = 1 - 1 / speedup
    return {t.name: Chosen("pair", max(1, uniform_rank(t, ratio))) for t in free if t.break_even_rank > 0}


def _stand_in(question: Question, recipe: Recipe) -> Allocation:
    """Uniform ranks of the size that the allocation will have; its budget is known to suffice."""
    row, free, unit = ALLOCATIONS[recipe.allocation], question.targets, question.unit
    if not row.leaves_dense:
        return ALLOCATIONS["uniform"].allocate(question, Evidence(), recipe)
    if question.ratio is not None:
        return Allocation(question.in_forms(uniform_ranks(free, question.ratio, forms=question.forms)))
    if (in_bits := _uniform_bits(question)) is not None:
        return Allocation(in_bits)
    able = row.least(question, recipe).forms
    dense = sum(unit.cost(target, None) for target in free if target.name not in able)
    step = NVFP4_GROUP if recipe.factor_bits == 4 else 1
    free = [target for target in free if target.name in able]
    ranks = fill_budget(free, unit.left - dense, step, question.cost, question.forms)
    if ranks is None:  # the least sizes fit, but not as factors
        return Allocation(able)
    return Allocation(question.in_forms(ranks))


def _uniform_bits(question: Question) -> dict[str, Chosen] | None:
    """One number of bits for all that can have it: the most that fit, or the fewest. None without such forms."""
    names = sorted((name for name in question.forms if FORMS[name].bits), key=lambda name: -(FORMS[name].bits or 0))
    forms: dict[str, Chosen] = {}
    for name in names:
        able = [target for target in question.priced if FORMS[name].sizes(target, 1)]
        forms |= {target.name: Chosen(name, group_size_of(target)) for target in able}
        if question.unit.total(question.priced, forms) <= question.unit.budget:
            break
    return forms or None
