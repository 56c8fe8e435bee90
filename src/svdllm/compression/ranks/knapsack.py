"""The multiple-choice knapsack: what to do with every unit, total cost within a budget, least total loss.

A unit has alternatives, of which exactly one is taken. In an alternative, each part takes one of its choices, whatever
the others take, and their costs and losses add up. A linear is a unit with one alternative of one part; an MLP has two:
its linears apart, or the whole at a smaller width.

Three steps, after Pisinger ("A minimal algorithm for the multiple-choice knapsack problem", 1995):

1. The linear relaxation is a walk down the lower convex hulls of all units, steepest segment first. The hull of a sum
   of parts is made of the segments of their hulls; that of a unit is the hull of its alternatives' hulls. The slope at
   which the budget is spent prices cost, and gives a lower bound on the loss and a first solution.
2. A choice whose loss plus priced cost exceeds the best of its unit by more than the first solution exceeds the bound
   is in no better solution, and is dropped; so are sums of parts, which are few by then.
3. What is left is searched unit by unit, those that are nearest to a change first. A state is a cost and a loss; it is
   dropped if another state costs and loses no more, or if the linear relaxation of the units still to come shows that
   it cannot lead to a better solution.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import fsum, gcd, inf, isfinite
from sys import float_info
from typing import Generic, TypeVar

import numpy as np

from svdllm.compression.ranks.knapsack_items import (
    NOT_TAKEN,
    Integers,
    Item,
    hull_segments,
    outline,
    pareto,
    sums_within,
    union,
)
from svdllm.compression.ranks.knapsack_search import ROUNDING, Incumbent, Stage, search

T = TypeVar("T")


@dataclass(frozen=True)
class Choice(Generic[T]):
    """One thing that may be done with a part, such as a form and a size."""

    what: T
    cost: int  # in the unit of the budget
    loss: float  # finite; in any unit that adds up over parts


@dataclass(frozen=True)
class Unit(Generic[T]):
    """What may be done with a linear or an MLP: one of its alternatives, part name -> choices of this part.

    Raises:
        ValueError: there is no alternative, an alternative has no part, a part has no choice, or a loss is not finite;
            names the part.
    """

    alternatives: Sequence[Mapping[str, Sequence[Choice[T]]]]

    def __post_init__(self) -> None:
        if not self.alternatives or not all(self.alternatives):
            raise ValueError(f"A unit needs an alternative, and each of them a part, got {self.alternatives}.")
        for name, choices in chain.from_iterable(parts.items() for parts in self.alternatives):
            if not choices:
                raise ValueError(f"{name} has no choice: give at least one rank, or dense.")
            if not all(isfinite(choice.loss) for choice in choices):
                raise ValueError(f"{name}: losses must be finite, got {[choice.loss for choice in choices]}.")

    @property
    def names(self) -> list[str]:
        """Names of the parts of all alternatives, sorted."""
        return sorted(set(chain.from_iterable(self.alternatives)))


@dataclass(frozen=True)
class Solution(Generic[T]):
    """One choice for every part of the alternatives taken. None within the budget loses less than ``lower_bound``."""

    choices: dict[str, Choice[T]]  # in the order of the units
    cost: int
    loss: float
    lower_bound: float

    @property
    def gap(self) -> float:
        """How far the loss is from what is proven, as a share of it."""
        return (self.loss - self.lower_bound) / max(abs(self.loss), float_info.min)


def solve(units: Sequence[Unit[T]], budget: int, *, max_states: int = 300_000) -> Solution[T] | None:
    """The least total loss of one alternative per unit, one choice per part of it, within the budget.

    Losses may take any course in cost. The answer does not depend on the order of the units; of choices that are equal
    in cost and loss the first is taken.

    Args:
        units: what can be done with each unit. A name may be in several alternatives of one unit, but not in two units.
        budget: what may be spent, in the unit of the costs.
        max_states: how many partial solutions are looked at for one unit. Where there are more, those of the best
            bounds are, and ``lower_bound`` falls to the least bound of the others.

    Returns:
        The optimum, or None where not even the cheapest choices fit. Where ``max_states`` was reached it may not be
        the optimum; its gap then tells by how much at most. Otherwise the gap is 0.

    Raises:
        ValueError: a name is in two units.
    """
    _require_distinct(units)
    order = sorted(range(len(units)), key=lambda at: units[at].names)
    problems = [_parts_of(units[at]) for at in order]
    capacity = budget - sum(_least_cost(alternatives) for alternatives in problems)
    if capacity < 0:
        return None
    picks, bound = _optimise(*_above_the_least(problems, capacity), max_states)
    taken = {at: _taken(units[at], row) for at, row in zip(order, picks, strict=True)}
    choices = {name: choice for at in range(len(units)) for name, choice in taken[at].items()}
    loss = fsum(choice.loss for choice in choices.values())
    return Solution(
        choices=choices,
        cost=sum(choice.cost for choice in choices.values()),
        loss=loss,
        lower_bound=bound if bound < loss - ROUNDING * abs(loss) else loss,
    )


_Alternatives = list[list[Item]]  # the parts of each


def _require_distinct(units: Sequence[Unit[T]]) -> None:
    uses = Counter(chain.from_iterable(unit.names for unit in units))
    if twice := sorted(name for name, count in uses.items() if count > 1):
        raise ValueError(f"Every name must be in one unit only, found in more: {', '.join(twice)}.")


def _parts_of(unit: Unit[T]) -> _Alternatives:
    """The undominated choices of every part; within an alternative in the order of the names."""
    places = {place: column for column, place in enumerate(_places(unit))}
    return [
        [_undominated(parts[name], places[number, name], len(places)) for name in sorted(parts)]
        for number, parts in enumerate(unit.alternatives)
    ]


def _places(unit: Unit[T]) -> list[tuple[int, str]]:
    """Number of the alternative and name, of every part."""
    return [(number, name) for number, parts in enumerate(unit.alternatives) for name in parts]


def _undominated(choices: Sequence[Choice[T]], column: int, num_columns: int) -> Item:
    costs = np.array([choice.cost for choice in choices], dtype=np.int64)
    losses = np.array([choice.loss for choice in choices], dtype=np.float64)
    kept = pareto(costs, losses)
    picks = np.full((len(kept), num_columns), NOT_TAKEN)
    picks[:, column] = kept
    return Item(costs[kept], losses[kept], picks)


def _taken(unit: Unit[T], picks: Integers) -> dict[str, Choice[T]]:
    places = zip(_places(unit), picks.tolist(), strict=True)
    return {name: unit.alternatives[number][name][at] for (number, name), at in places if at != NOT_TAKEN}


def _least_cost(alternatives: _Alternatives) -> int:
    return min(_cost_of_cheapest(parts) for parts in alternatives)


def _cost_of_cheapest(parts: Sequence[Item]) -> int:
    return sum(int(part.costs[0]) for part in parts)


def _above_the_least(problems: Sequence[_Alternatives], capacity: int) -> tuple[list[_Alternatives], int]:
    """Costs above the cheapest of each unit, divided by their greatest common divisor; the capacity is rounded down."""
    shifted: list[_Alternatives] = []
    for alternatives in problems:
        least = _least_cost(alternatives)
        above = [_cost_of_cheapest(parts) - least for parts in alternatives]
        shifted.append([_shifted(parts, extra) for parts, extra in zip(alternatives, above, strict=True)])
    costs = [part.costs for alternatives in shifted for parts in alternatives for part in parts]
    unit = gcd(*(int(np.gcd.reduce(each)) for each in costs)) or 1
    scaled = [
        [[Item(part.costs // unit, part.losses, part.picks) for part in parts] for parts in alternatives]
        for alternatives in shifted
    ]
    return scaled, capacity // unit


def _shifted(parts: Sequence[Item], extra: int) -> list[Item]:
    """The parts with costs from 0 on; those of the first from ``extra`` on."""
    starts = [extra] + [0] * (len(parts) - 1)
    return [Item(p.costs - p.costs[0] + start, p.losses, p.picks) for p, start in zip(parts, starts, strict=True)]


def _optimise(problems: list[_Alternatives], capacity: int, max_states: int) -> tuple[list[Integers], float]:
    """The choices of every unit's parts, and a lower bound on the loss of any solution."""
    if not problems:
        return [], inf
    items = [union([outline(parts) for parts in alternatives]) for alternatives in problems]
    segments = hull_segments(items)
    spent = np.cumsum(segments.costs)
    num_taken = int(np.searchsorted(spent, capacity, side="right"))
    start = [0] * len(items)
    for owner, end in zip(segments.owners[:num_taken].tolist(), segments.ends[:num_taken].tolist(), strict=True):
        start[owner] = end
    if num_taken == len(segments.costs):
        return _picks_at(items, start), inf  # every unit at its least loss
    price = float(-segments.losses[num_taken] / segments.costs[num_taken])
    relaxed = fsum(float(item.priced(price).min()) for item in items) - price * capacity

    filled = _fill(items, capacity, start)
    loss = fsum(float(item.losses[at]) for item, at in zip(items, filled, strict=True))
    incumbent = Incumbent(_picks_at(items, filled), loss)
    if relaxed < incumbent.to_beat:
        starts = [int(item.costs[at]) for item, at in zip(items, start, strict=True)]
        near = [_near(alternatives, price, relaxed, incumbent, max_states) for alternatives in problems]
        search(_stages(near, starts, price), capacity, incumbent, max_states)
    return incumbent.picks, max(relaxed, min(incumbent.left_out, incumbent.loss))


def _picks_at(items: Sequence[Item], positions: Sequence[int]) -> list[Integers]:
    return [item.picks[at] for item, at in zip(items, positions, strict=True)]


def _near(alternatives: _Alternatives, price: float, relaxed: float, incumbent: Incumbent, max_states: int) -> Item:
    """What may be done with a unit in a solution that is better than the incumbent."""
    least = [fsum(float(part.priced(price).min()) for part in parts) for parts in alternatives]
    found = []
    for parts, own in zip(alternatives, least, strict=True):
        bound = relaxed + own - min(least)
        if bound < incumbent.to_beat:
            sums, regret = sums_within(parts, price, incumbent.to_beat - bound, max_states)
            incumbent.left_out = min(incumbent.left_out, bound + regret)
            found.append(sums)
    return union(found)


def _stages(items: Sequence[Item], starts: Sequence[int], price: float) -> list[Stage]:
    """Units in the order of the search: a second choice of little regret is likely to be taken, and comes first.

    ``starts`` are the costs at which the linear relaxation has the units.
    """
    regrets = [np.sort(item.regrets(price)) for item in items]
    nearest = [float(regret[1]) if len(regret) > 1 else inf for regret in regrets]
    order = sorted(range(len(items)), key=nearest.__getitem__)
    at = [max(0, int(np.searchsorted(i.costs, cost, side="right")) - 1) for i, cost in zip(items, starts, strict=True)]
    return [Stage(owner, items[owner], at[owner]) for owner in order]


def _fill(items: Sequence[Item], capacity: int, start: Sequence[int]) -> list[int]:
    """Improves a solution by single changes: each time the change that gains most among those that still fit."""
    owners = np.repeat(np.arange(len(items)), [len(item.costs) for item in items])
    first = np.cumsum([0] + [len(item.costs) for item in items[:-1]])
    costs, losses = np.concatenate([i.costs for i in items]), np.concatenate([i.losses for i in items])
    chosen = first + np.array(start)
    while True:
        left = capacity - costs[chosen].sum()
        gains = np.where(costs - costs[chosen][owners] <= left, losses[chosen][owners] - losses, 0.0)
        best = int(np.argmax(gains))
        if gains[best] <= 0:
            return (chosen - first).tolist()
        chosen[owners[best]] = best
