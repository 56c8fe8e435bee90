"""From a budget to ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import floor

from svdllm.checkpoint.quantized import NVFP4_GROUP
from svdllm.checkpoint.tensors import Tensors, elastic_tensors, file_bytes, tensor_bytes
from svdllm.common.errors import InputError
from svdllm.compression.ranks import (
    Allocation,
    Cost,
    Evidence,
    Ranks,
    candidate_ranks,
    effective_ranks,
    exact_floor,
    fill_budget,
    loss_ranks,
    strs_ranks,
    uniform_rank,
    uniform_ranks,
    v2_ranks,
)
from svdllm.compression.ranks.linear_times import LinearTimes
from svdllm.compression.ranks.predicted_sizes import WrittenFiles
from svdllm.compression.recipe import Recipe
from svdllm.models.structure import Structure, Target


def choose_ranks(
    recipe: Recipe, structure: Structure, files: WrittenFiles, evidence: Evidence | None = None
) -> Allocation:
    """The rank of every factorised target; the others stay dense.

    ``files`` tell the size for given ranks that a budget of bytes is for: as they are written, or once quantised.
    ``evidence`` is what an allocation other than uniform is chosen by; before it is there, uniform ranks stand in.

    Raises:
        InputError: a pattern matches nothing, a rank would be 0, or the budget cannot be met; says what can.
    """
    targets = structure.targets
    if recipe.ranks is not None:
        return Allocation(_explicit_ranks(recipe.ranks, targets))
    free, fixed = _free_and_fixed(recipe, targets)
    _require_ranks_above_zero(fixed, targets, recipe)
    if recipe.allocation == "uniform":
        chosen = Allocation(_uniform(recipe, files, free, fixed))
    elif evidence is None:
        chosen = Allocation(_stand_in(recipe, files, free, fixed))
    else:
        chosen = _by_evidence(recipe, structure, files, free, fixed, evidence)
    ranks = fixed | chosen.ranks
    _require_ranks_above_zero(ranks, targets, recipe)
    if not ranks:
        raise InputError(
            f"The overrides leave all {len(targets)} linears dense: nothing is left to compress. Drop one of "
            f"{', '.join(map(repr, recipe.overrides))}."
        )
    ordered = {target.name: ranks[target.name] for target in targets if target.name in ranks}
    return replace(chosen, ranks=ordered)


def require_fast_enough(recipe: Recipe, structure: Structure, times: LinearTimes) -> None:
    """Raises InputError if not even the least ranks are as fast as ``target_speedup``; says what is."""
    free, fixed = _free_and_fixed(recipe, structure.targets)
    _time(recipe, structure, free, fixed, times).require_met(recipe, free)


def spare_ranks(recipe: Recipe, structure: Structure, ranks: Mapping[str, int]) -> Ranks:
    """Of the linears that an allocation leaves dense, the largest rank that it may give each at a higher ratio.

    What an override leaves dense is dense at every ratio, and not among them.
    """
    overridden = _overrides(recipe, structure.targets)
    spare = {t.name: t.break_even_rank // recipe.round_to * recipe.round_to for t in structure.targets}
    return {name: rank for name, rank in spare.items() if rank and name not in ranks and name not in overridden}


def elastic_bytes(recipe: Recipe, structure: Structure, stored: Tensors, ranks: Mapping[str, int], known: bool) -> int:
    """Exact size of the elastic files, 0 where there are none.

    Where the ranks are not ``known`` yet, the most it can be: the linears that stay dense take no more than the budget.
    """
    if not recipe.elastic:
        return 0
    if known:
        return file_bytes(elastic_tensors(structure, stored, spare_ranks(recipe, structure, ranks)))
    if recipe.allocation == "v2":  # leaves nothing dense
        return file_bytes(elastic_tensors(structure, stored, {}))
    assert isinstance(recipe.ratio, float)
    most = elastic_tensors(structure, stored, spare_ranks(recipe, structure, {}))
    itemsize = max(stored[f"{target.linears[0]}.weight"][1].itemsize for target in structure.targets)
    budget = exact_floor((1 - recipe.ratio) * structure.num_target_params) * itemsize
    factors = tensor_bytes(most) - tensor_bytes(elastic_tensors(structure, stored, {}))
    return file_bytes(most) - max(0, factors - budget)


@dataclass(frozen=True)
class _Unit:
    """What a budget is counted in, and how much of it is outside the targets whose ranks are free."""

    what: str
    budget: int
    outside: int
    cost: Cost

    @property
    def left(self) -> int:
        """For the targets whose ranks are free."""
        return self.budget - self.outside

    def total(self, free: Sequence[Target], ranks: Mapping[str, int]) -> int:
        """With these ranks; a target that has none stays dense."""
        return self.outside + sum(self.cost(t, ranks.get(t.name)) for t in free)

    def require_met(self, recipe: Recipe, free: Sequence[Target]) -> None:
        """Raises InputError if not even the least ranks that the allocation may choose fit."""
        least = self.total(free, _least_ranks(recipe, free, self.cost))
        if least > self.budget:
            raise self.cannot_be_met(recipe, least)

    def cannot_be_met(self, recipe: Recipe, least: int) -> InputError:
        at, advice = str(recipe.round_to), ""
        if recipe.allocation == "strs":
            at, advice = f"that of ratio {max(recipe.strs_ratios)}", ", or give a higher ratio in --strs-ratios"
        return InputError(
            f"{self.what} {self.budget:,} cannot be met: {self.outside:,} lie outside the compressed linears, and with "
            f"every rank at its least ({at}) the model still has {least:,}. Raise the budget to more than that{advice}."
        )


@dataclass(frozen=True)
class _Time(_Unit):
    """Nanoseconds of all linears: a rank has no cost of its own, and factors may take longer than the dense matrix."""

    times: LinearTimes
    dense: int  # of all linears

    def cannot_be_met(self, recipe: Recipe, least: int) -> InputError:
        possible = floor(100 * self.dense / least) / 100
        advice = f"Ask for {possible:.2f} or less" if possible > 1 else "Give another budget"
        return InputError(
            f"{self.what} cannot be met: of the dense linears' time for {self.times.tokens:,} tokens at once, "
            f"{self.outside / self.dense:.0%} lie outside the compressed linears, and with every rank at its least "
            f"({recipe.round_to}), or dense where that is faster, {least / self.dense:.0%} are left. {advice}."
        )


def _uniform(recipe: Recipe, files: WrittenFiles, free: Sequence[Target], fixed: Mapping[str, int]) -> Ranks:
    if recipe.ratio is not None:
        assert isinstance(recipe.ratio, float)
        return uniform_ranks(free, recipe.ratio, recipe.round_to)
    unit = _unit(recipe, files, free, fixed)
    ranks = fill_budget(free, unit.left, recipe.round_to, unit.cost)
    if ranks is None:
        raise unit.cannot_be_met(recipe, unit.total(free, _least_ranks(recipe, free, unit.cost)))
    return ranks


def _least_ranks(recipe: Recipe, free: Sequence[Target], cost: Cost) -> Ranks:
    """The least that an allocation may choose; a target without one, or that gains nothing by it, stays dense."""
    least = recipe.round_to
    if recipe.allocation != "strs":
        return {t.name: least for t in free if least <= t.break_even_rank and cost(t, least) < cost(t, None)}
    candidates = {t.name: candidate_ranks(t, recipe.strs_ratios, recipe.round_to) for t in free}
    return {name: ranks[0] for name, ranks in candidates.items() if ranks}


def _stand_in(recipe: Recipe, files: WrittenFiles, free: Sequence[Target], fixed: Mapping[str, int]) -> Ranks:
    """Uniform ranks in least steps, of the size that the allocation will have; its budget is known to suffice.

    Where time is the budget, ranks of about the size: as if time were parameters.
    """
    if recipe.target_speedup is not None:
        ratio = 1 - 1 / recipe.target_speedup
        return {t.name: max(1, uniform_rank(t, ratio)) for t in free if t.break_even_rank > 0}
    if recipe.allocation == "v2":
        return _uniform(recipe, files, free, fixed)
    unit = _unit(recipe, files, free, fixed)
    unit.require_met(recipe, free)
    if recipe.ratio is not None:
        assert isinstance(recipe.ratio, float)
        return uniform_ranks(free, recipe.ratio)
    able = _least_ranks(recipe, free, unit.cost)
    dense = sum(unit.cost(target, None) for target in free if target.name not in able)
    step = NVFP4_GROUP if recipe.factor_bits == 4 else 1
    ranks = fill_budget([target for target in free if target.name in able], unit.left - dense, step, unit.cost)
    assert ranks is not None  # the least ranks fit
    return ranks


def _by_evidence(
    recipe: Recipe,
    structure: Structure,
    files: WrittenFiles,
    free: Sequence[Target],
    fixed: Mapping[str, int],
    evidence: Evidence,
) -> Allocation:
    if recipe.allocation == "v2":
        assert isinstance(recipe.ratio, float)
        return Allocation(v2_ranks(free, evidence.energies, recipe.ratio, recipe.round_to))
    if evidence.times is None:
        unit = _unit(recipe, files, free, fixed)
    else:
        unit = _time(recipe, structure, free, fixed, evidence.times)
    unit.require_met(recipe, free)
    if recipe.allocation == "effective-rank":
        return Allocation(effective_ranks(free, evidence.energies, unit.left, recipe.round_to, unit.cost))
    if recipe.allocation == "strs":
        found = strs_ranks(free, evidence.probes, unit.left, unit.cost)
        assert found is not None  # the least ranks fit
        return Allocation(found[0], threshold=found[1])
    losses = {target.name: evidence.losses(target) for target in free}
    solution = loss_ranks(free, losses, unit.cost, unit.left, recipe.round_to)
    assert solution is not None
    ranks = {name: choice.rank for name, choice in solution.choices.items() if choice.rank is not None}
    return Allocation(ranks, predicted_loss=solution.loss, gap=solution.gap)


def _time(
    recipe: Recipe, structure: Structure, free: Sequence[Target], fixed: Mapping[str, int], times: LinearTimes
) -> _Time:
    assert recipe.target_speedup is not None
    dense = times.total(structure.targets, {})
    outside = times.total(structure.targets, fixed) - sum(times.of(target, None) for target in free)
    budget = floor(dense / recipe.target_speedup)
    return _Time(f"--target-speedup {recipe.target_speedup:g}", budget, outside, times.of, times, dense)


def _unit(recipe: Recipe, files: WrittenFiles, free: Sequence[Target], fixed: Mapping[str, int]) -> _Unit:
    if recipe.ratio is not None:
        assert isinstance(recipe.ratio, float)
        weights = sum(target.num_weights for target in free)
        return _Unit("The ratio's share of parameters,", exact_floor((1 - recipe.ratio) * weights), 0, Target.params)
    if recipe.target_size is not None:
        return _bytes(recipe, recipe.target_size, files, free, fixed)
    assert recipe.target_params is not None
    what, budget, dense = "--target-params", recipe.target_params, files.num_params({})
    _require_below(what, budget, dense, "has")
    outside = files.num_params(fixed) - sum(target.num_weights for target in free)
    return _Unit(what, budget, outside, Target.params)


def _bytes(recipe: Recipe, budget: int, files: WrittenFiles, free: Sequence[Target], fixed: Mapping[str, int]) -> _Unit:
    what, bits = "--target-size", "" if recipe.factor_bits is None else f" in {recipe.factor_bits} bits"
    _require_below(what, budget, files.num_bytes({}), f"has{bits}")
    parts = {target.name: files.part(target) for target in free}

    @cache
    def cost(target: Target, rank: int | None) -> int:
        return parts[target.name].share({} if rank is None else {target.name: rank}, budget)

    outside = files.most_bytes(fixed, budget) - sum(cost(target, None) for target in free)
    return _Unit(what, budget, outside, cost)


def _require_below(what: str, budget: int, dense: int, has: str) -> None:
    if budget >= dense:
        raise InputError(f"{what} {budget:,} is not below what the dense model {has} ({dense:,}): nothing to compress.")


def _explicit_ranks(ranks: Mapping[str, int | str], targets: Sequence[Target]) -> Ranks:
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


def _free_and_fixed(recipe: Recipe, targets: Sequence[Target]) -> tuple[list[Target], Ranks]:
    """The targets whose ranks the allocation chooses, and the ranks that overrides give to others."""
    overridden = _overrides(recipe, targets)
    fixed = {t.name: uniform_rank(t, overridden[t.name], recipe.round_to) for t in targets if overridden.get(t.name)}
    return [target for target in targets if target.name not in overridden], fixed


def _overrides(recipe: Recipe, targets: Sequence[Target]) -> dict[str, float]:
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
