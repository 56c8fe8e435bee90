"""The arithmetic of a knapsack's choices: which are dominated, lower convex hulls, sums of independent parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import inf

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

NOT_TAKEN = -1


@dataclass(frozen=True)
class Item:
    """Things to do with a unit, of which none dominates another: costs rise, losses fall, both strictly.

    ``picks`` (things x parts of the unit) tells the choice of every part, or ``NOT_TAKEN`` for the parts of other
    alternatives.
    """

    costs: Integers
    losses: Floats
    picks: Integers

    @classmethod
    def best_of(cls, costs: Integers, losses: Floats, picks: Integers) -> Item:
        kept = pareto(costs, losses)
        return cls(costs[kept], losses[kept], picks[kept])

    def __add__(self, other: Item) -> Item:
        """The sums of one thing of each of two items of different parts."""
        costs = (self.costs[:, None] + other.costs).ravel()
        losses = (self.losses[:, None] + other.losses).ravel()
        kept = pareto(costs, losses)
        one, two = np.divmod(kept, len(other.costs))
        return Item(costs[kept], losses[kept], np.maximum(self.picks[one], other.picks[two]))

    def only(self, kept: Integers) -> Item:
        return Item(self.costs[kept], self.losses[kept], self.picks[kept])

    def priced(self, price: float) -> Floats:
        return self.losses + price * self.costs

    def regrets(self, price: float) -> Floats:
        """By how much each priced loss exceeds the least."""
        values = self.priced(price)
        return values - values.min()


@dataclass(frozen=True)
class Segments:
    """The edges of the lower convex hulls of several items, steepest first."""

    owners: Integers  # index of the item
    ends: Integers  # the thing of the item that the edge leads to
    costs: Integers  # what the edge adds
    losses: Floats  # what the edge adds: negative


def union(items: Sequence[Item]) -> Item:
    """One thing of one of several items."""
    if len(items) == 1:
        return items[0]
    costs, losses = np.concatenate([i.costs for i in items]), np.concatenate([i.losses for i in items])
    return Item.best_of(costs, losses, np.concatenate([i.picks for i in items]))


def outline(parts: Sequence[Item]) -> Item:
    """The item itself if it is the only one, or else the sums on the lower convex hull of all sums of the parts.

    That hull follows the segments of the parts' hulls, steepest first.
    """
    if len(parts) == 1:
        return parts[0]
    segments = hull_segments(parts)
    ends = [np.where(segments.owners == owner, segments.ends, 0) for owner in range(len(parts))]
    chosen = [np.maximum.accumulate(np.concatenate([[0], at])) for at in ends]
    things = [part.only(at) for part, at in zip(parts, chosen, strict=True)]
    return Item.best_of(
        reduce(np.add, [thing.costs for thing in things]),
        reduce(np.add, [thing.losses for thing in things]),
        reduce(np.maximum, [thing.picks for thing in things]),
    )


def sums_within(parts: Sequence[Item], price: float, most: float, limit: int) -> tuple[Item, float]:
    """The sums of one thing of each part whose regret is below ``most``, a positive number.

    Where more than ``limit`` sums would have to be looked at, those of least regret are.

    Returns:
        The sums, and the least regret of those that were left out beyond the limit (infinite if none was).
    """
    near = [part.only(np.flatnonzero(part.regrets(price) < most)) for part in parts]
    sums, left_out = near[0], inf
    for part in near[1:]:
        sums, cut = _of_least_regret(sums, price, max(1, limit // len(part.costs)))
        sums = sums + part
        sums = sums.only(np.flatnonzero(sums.regrets(price) < most))
        left_out = min(left_out, cut)
    return sums, left_out


def _of_least_regret(item: Item, price: float, count: int) -> tuple[Item, float]:
    regrets = item.regrets(price)
    by_regret = np.argsort(regrets, kind="stable")
    return item.only(np.sort(by_regret[:count])), float(regrets[by_regret[count:]].min(initial=inf))


def hull_segments(items: Sequence[Item]) -> Segments:
    hulls = [_lower_hull(item.costs, item.losses) for item in items]
    owners = np.concatenate([np.full(len(hull) - 1, owner, dtype=np.int64) for owner, hull in enumerate(hulls)])
    ends = np.concatenate([hull[1:] for hull in hulls])
    costs = np.concatenate([np.diff(item.costs[hull]) for item, hull in zip(items, hulls, strict=True)])
    losses = np.concatenate([np.diff(item.losses[hull]) for item, hull in zip(items, hulls, strict=True)])
    order = np.argsort(losses / costs, kind="stable")
    return Segments(owners[order], ends[order], costs[order], losses[order])


def _lower_hull(costs: Integers, losses: Floats) -> Integers:
    """The points of the lower convex hull: slopes rise strictly."""
    hull: list[int] = []
    slopes: list[float] = []  # of the edge that leads to each point but the first
    points = list(zip(costs.tolist(), losses.tolist(), strict=True))
    for point, (cost, loss) in enumerate(points):
        while hull:
            before = points[hull[-1]]
            slope = (loss - before[1]) / (cost - before[0])
            if not slopes or slopes[-1] < slope:
                slopes.append(slope)
                break
            hull.pop()
            slopes.pop()
        hull.append(point)
    return np.array(hull, dtype=np.int64)


def pareto(costs: Integers, losses: Floats) -> Integers:
    """Positions of the choices that no other choice dominates, by rising cost; of equal choices the first."""
    order = np.lexsort((losses, costs))
    sorted_losses = losses[order]
    best_before = np.concatenate([[inf], np.minimum.accumulate(sorted_losses)[:-1]])
    return order[sorted_losses < best_before]
