"""An allocation: the question, the evidence, and the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import floor
from typing import NamedTuple

from torch import Tensor

from svdllm.checkpoint.elastic import Probes
from svdllm.common.errors import InputError
from svdllm.compression.forms import factors_of
from svdllm.compression.ranks.linear_times import LinearTimes
from svdllm.models.chosen import Chosen, Forms
from svdllm.models.structure import Target

Ranks = dict[str, int]  # target name -> rank; a target that is not in it stays dense
# What a target costs in a form, or its dense matrix (None), in the unit of the budget. Rises with the size of the form.
Cost = Callable[[Target, Chosen | None], int]
# The same by the rank of its factors.
RankCost = Callable[[Target, int | None], int]


ROUNDED = " in bits"


def rounded(unit: str) -> str:
    """The name of the probe of a unit that is rounded, beside that of the same unit truncated."""
    return unit + ROUNDED


def probed_unit(name: str) -> str:
    """The unit that a probe changes."""
    return name.removesuffix(ROUNDED)


class Least(NamedTuple):
    """The least sizes that an allocation may choose, and how to name them in a message."""

    forms: Forms
    at: str
    advice: str = ""  # what else to do where they do not fit, from a comma on


@dataclass(frozen=True)
class Unit:
    """The unit of a budget, and how much of it lies outside the targets whose forms are free."""

    what: str
    budget: int
    outside: int
    cost: Cost

    @property
    def left(self) -> int:
        """The budget of the targets whose forms are free."""
        return self.budget - self.outside

    def total(self, free: Sequence[Target], forms: Forms) -> int:
        """The cost of the model in these forms; a target without a form stays dense."""
        return self.outside + sum(self.cost(t, forms.get(t.name)) for t in free)

    def cannot_be_met(self, total: int, least: Least) -> InputError:
        """The error to raise where the least sizes cost a ``total`` above the budget."""
        return InputError(
            f"{self.what} {self.budget:,} cannot be met: {self.outside:,} lie outside the compressed linears, and with "
            f"every linear at its least ({least.at}) the model still has {total:,}. Raise the budget to more than that"
            f"{least.advice}."
        )


@dataclass(frozen=True)
class TimeUnit(Unit):
    """Nanoseconds of all linears: a size has no cost of its own, and factors may take longer than the dense matrix."""

    times: LinearTimes
    dense: int  # of all linears

    def cannot_be_met(self, total: int, least: Least) -> InputError:
        possible = floor(100 * self.dense / total) / 100
        advice = f"Ask for {possible:.2f} or less" if possible > 1 else "Give another budget"
        return InputError(
            f"{self.what} cannot be met: of the dense linears' time for {self.times.tokens:,} tokens at once, "
            f"{self.outside / self.dense:.0%} lie outside the compressed linears, and with every linear at its least "
            f"({least.at}), or dense where that is faster, {total / self.dense:.0%} are left. {advice}."
        )


@dataclass(frozen=True)
class Question:
    """Which forms, that cost at most ``unit.left`` together, for these targets?

    Args:
        forms: names of the forms that may be used, beside dense.
        mlps: name -> the targets of an MLP, where all of them are free.
        round_to: sizes are multiples of this, and at least this.
        ratio: the share of the targets' parameters to remove, where that is the budget.
        vocabulary: embedding and head, where a form can store them smaller. They cost and are chosen like targets.
        joins: whether targets that read the same tensor get one form.
    """

    targets: Sequence[Target]
    unit: Unit
    forms: Sequence[str] = ("pair",)
    mlps: Mapping[str, Sequence[Target]] = field(default_factory=dict)
    round_to: int = 1
    ratio: float | None = None
    vocabulary: Sequence[Target] = ()
    joins: bool = False

    @property
    def joined(self) -> dict[str, list[Target]]:
        """The targets that get one form together, by the name of the first."""
        groups: dict[str, list[Target]] = {}
        for target in self.priced:
            groups.setdefault(target.group if self.joins else target.name, []).append(target)
        return {members[0].name: members for members in groups.values()}

    @property
    def priced(self) -> list[Target]:
        """Everything that the budget pays for."""
        return [*self.targets, *self.vocabulary]

    def cost(self, target: Target, rank: int | None) -> int:
        """The cost of a target's factors at a rank; None is its dense matrix."""
        return self.unit.cost(target, None if rank is None else Chosen(factors_of(target, self.forms).name, rank))

    def in_forms(self, ranks: Mapping[str, int]) -> dict[str, Chosen]:
        """The answer of an allocation of ranks."""
        names = {target.name: factors_of(target, self.forms).name for target in self.targets}
        return {name: Chosen(names[name], rank) for name, rank in ranks.items()}

    def require_met(self, least: Least) -> None:
        """Raises InputError if not even the least sizes fit."""
        total = self.unit.total(self.priced, least.forms)
        if total > self.unit.budget:
            raise self.unit.cannot_be_met(total, least)


@dataclass(frozen=True)
class Evidence:
    """The results of the analysis: the eigenvalues of every target (descending), and its probes if it was probed.

    ``narrowings`` are the squared errors of every narrowed MLP by its width, ``roundings`` those of targets by bits,
    and ``corrections`` by bits those at every rank of a correction. A probe is the measure of the allocation with one
    target or MLP changed alone, by size; of a unit that is rounded, by bits and under the name ``rounded(unit)``.
    ``times`` are given if time is the budget. ``held`` are the factors that an elastic checkpoint has: no larger rank
    can be cut from it. Of the targets in ``not_dense`` it has no more.
    """

    energies: Mapping[str, Tensor] = field(default_factory=dict)
    probes: Probes = field(default_factory=dict)
    times: LinearTimes | None = None
    narrowings: Mapping[str, Tensor] = field(default_factory=dict)
    roundings: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    corrections: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)
    held: Forms | None = None
    not_dense: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Allocation:
    """Forms and sizes, and what the row that chose them reports."""

    forms: Forms
    predicted_loss: float | None = None  # nats per token
    gap: float | None = None  # how far the predicted loss may be above the least possible, as a share of it
    threshold: float | None = None  # nats per token; the loss of no linear truncated alone exceeds it
