"""The multiple-choice knapsack: one choice per target, total cost within a budget, least total loss.

Three steps, after Pisinger ("A minimal algorithm for the multiple-choice knapsack problem", 1995):

1. The linear relaxation is a walk down the lower convex hulls of all targets, steepest segment first. The slope at
   which the budget is spent prices cost, and gives a lower bound on the loss and a first solution.
2. A choice whose loss plus priced cost exceeds the best of its target by more than the first solution exceeds the
   bound is in no better solution, and is dropped.
3. What is left is searched target by target, those that are nearest to a change of choice first. A state is a cost and
   a loss; it is dropped if another state costs and loses no more, or if the linear relaxation of the targets still to
   come shows that it cannot lead to a better solution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum, gcd, inf, isfinite
from sys import float_info

import numpy as np
from numpy.typing import NDArray

# Losses that differ by less than this share count as equal: sums in another order differ by as much.
ROUNDING = 1e-12

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """One thing that may be done with a target; ``rank`` is None where it stays dense."""

    rank: int | None
    cost: int  # in the unit of the budget
    loss: float  # finite; in any unit that adds up over targets


@dataclass(frozen=True)
class Solution:
    """One choice per target. No solution within the budget loses less than ``lower_bound``."""

    choices: dict[str, Choice]  # in the order of the question
    cost: int
    loss: float
    lower_bound: float

    @property
    def gap(self) -> float:
        """How far the loss is from what is proven, as a share of it."""
        return (self.loss - self.lower_bound) / max(abs(self.loss), float_info.min)


def solve(choices: Mapping[str, Sequence[Choice]], budget: int, *, max_states: int = 100_000) -> Solution | None:
    """The least total loss of one choice per target whose total cost is at most ``budget``.

    Losses may take any course in cost. The answer does not depend on the order of the targets in the mapping; of
    choices that are equal in cost and loss the first is taken.

    Args:
        choices: what can be done with each target; at least one choice each.
        budget: what may be spent, in the unit of the costs.
        max_states: how many partial solutions are looked at for one target. Where there are more, those of the best
            bounds are, and ``lower_bound`` falls to the least bound of the others.

    Returns:
        The optimum, or None where not even the cheapest choices fit. Where ``max_states`` was reached it may not be
        the optimum; its gap then tells by how much at most. Otherwise the gap is 0.

    Raises:
        ValueError: a target has no choice, or a loss is not finite; names the target.
    """
    names = sorted(choices)
    items = [_undominated(name, choices[name]) for name in names]
    capacity = budget - sum(int(item.costs[0]) for item in items)
    if capacity < 0:
        return None
    positions, bound = _optimise(*_in_common_units(items, capacity), max_states)
    picked = {name: choices[name][item.origins[at]] for name, item, at in zip(names, items, positions, strict=True)}
    loss = fsum(choice.loss for choice in picked.values())
    return Solution(
        choices={name: picked[name] for name in choices},
        cost=sum(choice.cost for choice in picked.values()),
        loss=loss,
        lower_bound=bound if bound < loss - ROUNDING * abs(loss) else loss,
    )


@dataclass(frozen=True)
class _Item:
    """The choices of one target that are not dominated: costs rise, losses fall, both strictly."""

    costs: Integers
    losses: Floats
    origins: Integers  # where each choice is in a longer list

    def only(self, kept: Integers) -> _Item:
        return _Item(self.costs[kept], self.losses[kept], kept)


@dataclass(frozen=True)
class _Segments:
    """The edges of the lower convex hulls of several items, steepest first."""

    owners: Integers  # index of the item
    ends: Integers  # the choice of the item that the edge leads to
    costs: Integers  # what the edge adds
    losses: Floats  # what the edge adds: negative


@dataclass
class _Incumbent:
    """The best solution so far, and the least bound of the states that were left out without proof."""

    positions: list[int]
    loss: float
    left_out: float = inf

    def promising(self, bounds: Floats) -> Integers:
        """Positions of the bounds that leave room for a better solution."""
        return np.flatnonzero(bounds < self.loss - ROUNDING * abs(self.loss))


def _undominated(name: str, choices: Sequence[Choice]) -> _Item:
    if not choices:
        raise ValueError(f"{name} has no choice: give at least one rank, or dense.")
    if not all(isfinite(choice.loss) for choice in choices):
        raise ValueError(f"{name}: losses must be finite, got {[choice.loss for choice in choices]}.")
    costs = np.array([choice.cost for choice in choices], dtype=np.int64)
    losses = np.array([choice.loss for choice in choices], dtype=np.float64)
    kept = _pareto(costs, losses)
    return _Item(costs, losses, kept).only(kept)


def _in_common_units(items: list[_Item], capacity: int) -> tuple[list[_Item], int]:
    """Costs above the cheapest choice, divided by their greatest common divisor; the capacity is rounded down."""
    shifted = [item.costs - item.costs[0] for item in items]
    unit = gcd(*(int(np.gcd.reduce(costs)) for costs in shifted)) or 1
    scaled = [_Item(costs // unit, item.losses, item.origins) for item, costs in zip(items, shifted, strict=True)]
    return scaled, capacity // unit


def _optimise(items: list[_Item], capacity: int, max_states: int) -> tuple[list[int], float]:
    """The chosen position within each item, and a lower bound on the loss of any solution."""
    if not items:
        return [], inf
    segments = _hull_segments(items)
    spent = np.cumsum(segments.costs)
    num_taken = int(np.searchsorted(spent, capacity, side="right"))
    start = [0] * len(items)
    for owner, end in zip(segments.owners[:num_taken].tolist(), segments.ends[:num_taken].tolist(), strict=True):
        start[owner] = end
    if num_taken == len(segments.costs):
        return start, inf  # every target at its least loss
    price = float(-segments.losses[num_taken] / segments.costs[num_taken])
    priced = [item.losses + price * item.costs for item in items]
    relaxed = fsum(float(values.min()) for values in priced) - price * capacity

    filled = _fill(items, capacity, start)
    incumbent = _Incumbent(filled, fsum(float(i.losses[at]) for i, at in zip(items, filled, strict=True)))
    regrets = [values - values[at] for values, at in zip(priced, start, strict=True)]
    kept = [incumbent.promising(relaxed + regret) for regret in regrets]
    if all(len(positions) for positions in kept):
        # A second choice that costs little regret is likely to change: such targets come first.
        nearest = [float(np.sort(regret[k])[1]) if len(k) > 1 else inf for regret, k in zip(regrets, kept, strict=True)]
        order = sorted(range(len(items)), key=nearest.__getitem__)
        _search([_Stage(i, items[i].only(kept[i]), start[i]) for i in order], capacity, incumbent, max_states)
    return incumbent.positions, max(relaxed, min(incumbent.left_out, incumbent.loss))


def _hull_segments(items: Sequence[_Item]) -> _Segments:
    hulls = [_lower_hull(item.costs, item.losses) for item in items]
    owners = np.concatenate([np.full(len(hull) - 1, owner, dtype=np.int64) for owner, hull in enumerate(hulls)])
    ends = np.concatenate([hull[1:] for hull in hulls])
    costs = np.concatenate([np.diff(item.costs[hull]) for item, hull in zip(items, hulls, strict=True)])
    losses = np.concatenate([np.diff(item.losses[hull]) for item, hull in zip(items, hulls, strict=True)])
    order = np.argsort(losses / costs, kind="stable")
    return _Segments(owners[order], ends[order], costs[order], losses[order])


def _lower_hull(costs: Integers, losses: Floats) -> Integers:
    """The points of the lower convex hull: slopes rise strictly."""
    hull: list[int] = []
    slopes: list[float] = []  # of the edge that leads to each point but the first
    for point, (cost, loss) in enumerate(zip(costs.tolist(), losses.tolist(), strict=True)):
        while hull:
            slope = (loss - losses[hull[-1]]) / (cost - costs[hull[-1]])
            if not slopes or slopes[-1] < slope:
                slopes.append(slope)
                break
            hull.pop()
            slopes.pop()
        hull.append(point)
    return np.array(hull, dtype=np.int64)


def _pareto(costs: Integers, losses: Floats) -> Integers:
    """Positions of the choices that no other choice dominates, by rising cost; of equal choices the first."""
    order = np.lexsort((losses, costs))
    sorted_losses = losses[order]
    best_before = np.concatenate([[inf], np.minimum.accumulate(sorted_losses)[:-1]])
    return order[sorted_losses < best_before]


def _fill(items: Sequence[_Item], capacity: int, start: Sequence[int]) -> list[int]:
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


@dataclass(frozen=True)
class _Stage:
    """One target of the search."""

    owner: int  # its index among all items
    item: _Item  # the choices that reduced costs kept
    start: int  # the choice at which the relaxation has it, as a position in the unreduced item

    @property
    def start_at(self) -> int:
        return int(np.searchsorted(self.item.origins, self.start))


def _search(stages: Sequence[_Stage], capacity: int, incumbent: _Incumbent, max_states: int) -> None:
    """Improves the incumbent, and records in it the least bound of the states that are left out without proof."""
    costs, losses, bounds = np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1)
    history: list[tuple[Integers, Integers]] = []  # per stage and state: the state before, and the choice
    segments = _hull_segments([stage.item for stage in stages])
    for depth, stage in enumerate(stages):
        rest = stages[depth + 1 :]
        num_choices = len(stage.item.costs)
        limit = max(1, max_states // num_choices)
        by_bound = np.argsort(bounds, kind="stable")
        incumbent.left_out = min(incumbent.left_out, float(bounds[by_bound[limit:]].min(initial=inf)))
        before = np.sort(by_bound[:limit])
        costs = (costs[before, None] + stage.item.costs).ravel()
        losses = (losses[before, None] + stage.item.losses).ravel()
        kept = _pareto(costs, losses)
        costs, losses = costs[kept], losses[kept]
        history.append((before[kept // num_choices], kept % num_choices))

        # The rest at the choices of the relaxation makes whole solutions of the states.
        loss_at_start = fsum(float(other.item.losses[other.start_at]) for other in rest)
        cost_at_start = sum(int(other.item.costs[other.start_at]) for other in rest)
        whole = np.where(costs + cost_at_start <= capacity, losses + loss_at_start, inf)
        best = int(np.argmin(whole))
        if whole[best] < incumbent.loss:
            incumbent.loss = float(whole[best])
            incumbent.positions = _positions(stages, history, best)

        bounds = losses + _relaxed_rest(rest, segments, depth, capacity - costs)
        kept = incumbent.promising(bounds)
        if not len(kept):
            return
        costs, losses, bounds = costs[kept], losses[kept], bounds[kept]
        history[-1] = (history[-1][0][kept], history[-1][1][kept])


def _relaxed_rest(rest: Sequence[_Stage], segments: _Segments, depth: int, left: Integers) -> Floats:
    """The least loss of the stages after ``depth`` in the linear relaxation, for each budget that may be left."""
    later = segments.owners > depth
    spent = np.concatenate([[0], np.cumsum(segments.costs[later])]) + sum(int(s.item.costs[0]) for s in rest)
    losses = np.concatenate([[0.0], np.cumsum(segments.losses[later])])
    losses += fsum(float(s.item.losses[0]) for s in rest)
    return np.interp(left, spent, losses, left=inf)


def _positions(stages: Sequence[_Stage], history: Sequence[tuple[Integers, Integers]], state: int) -> list[int]:
    """The whole solution of a state of the last stage in ``history``, the rest at the choices of the relaxation."""
    chosen = [stage.start_at for stage in stages]
    for depth, (parents, picks) in reversed(list(enumerate(history))):
        chosen[depth] = int(picks[state])
        state = int(parents[state])
    by_owner = {stage.owner: int(stage.item.origins[at]) for stage, at in zip(stages, chosen, strict=True)}
    return [by_owner[owner] for owner in range(len(stages))]
