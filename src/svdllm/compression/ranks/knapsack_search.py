"""The exact search of a knapsack, unit by unit, over states of a cost and a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, inf

import numpy as np

from svdllm.compression.ranks.knapsack_items import Floats, Integers, Item, Segments, hull_segments, pareto

# Losses that differ by less than this share count as equal: sums in another order differ by as much.
ROUNDING = 1e-12


@dataclass
class Incumbent:
    """The best solution so far, and the least bound of what was left out without proof."""

    picks: list[Integers]  # of every unit
    loss: float
    left_out: float = inf

    @property
    def to_beat(self) -> float:
        """Only a bound below this leaves room for a better solution."""
        return self.loss - ROUNDING * abs(self.loss)


@dataclass(frozen=True)
class Stage:
    """One unit of the search."""

    owner: int  # its index among all units
    item: Item  # the things to do with it that may be in a better solution
    start: int  # the thing at which the linear relaxation has it


def search(stages: Sequence[Stage], capacity: int, incumbent: Incumbent, max_states: int) -> None:
    """Improves the incumbent, and records in it the least bound of the states that are left out without proof."""
    costs, losses, bounds = np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1)
    history: list[tuple[Integers, Integers]] = []  # per stage and state: the state before, and the thing done
    segments = hull_segments([stage.item for stage in stages])
    for depth, stage in enumerate(stages):
        rest = stages[depth + 1 :]
        num_things = len(stage.item.costs)
        limit = max(1, max_states // num_things)
        by_bound = np.argsort(bounds, kind="stable")
        incumbent.left_out = min(incumbent.left_out, float(bounds[by_bound[limit:]].min(initial=inf)))
        before = np.sort(by_bound[:limit])
        costs = (costs[before, None] + stage.item.costs).ravel()
        losses = (losses[before, None] + stage.item.losses).ravel()
        kept = pareto(costs, losses)
        costs, losses = costs[kept], losses[kept]
        history.append((before[kept // num_things], kept % num_things))

        # The rest at the things of the relaxation makes whole solutions of the states.
        loss_at_start = fsum(float(other.item.losses[other.start]) for other in rest)
        cost_at_start = sum(int(other.item.costs[other.start]) for other in rest)
        whole = np.where(costs + cost_at_start <= capacity, losses + loss_at_start, inf)
        best = int(np.argmin(whole))
        if whole[best] < incumbent.loss:
            incumbent.loss = float(whole[best])
            incumbent.picks = _picks(stages, history, best)

        bounds = losses + _relaxed_rest(rest, segments, depth, capacity - costs)
        kept = np.flatnonzero(bounds < incumbent.to_beat)
        if not len(kept):
            return
        costs, losses, bounds = costs[kept], losses[kept], bounds[kept]
        history[-1] = (history[-1][0][kept], history[-1][1][kept])


def _relaxed_rest(rest: Sequence[Stage], segments: Segments, depth: int, left: Integers) -> Floats:
    """The least loss of the stages after ``depth`` in the linear relaxation, for each budget that may be left."""
    later = segments.owners > depth
    spent = np.concatenate([[0], np.cumsum(segments.costs[later])]) + sum(int(s.item.costs[0]) for s in rest)
    losses = np.concatenate([[0.0], np.cumsum(segments.losses[later])])
    losses += fsum(float(s.item.losses[0]) for s in rest)
    return np.interp(left, spent, losses, left=inf)


def _picks(stages: Sequence[Stage], history: Sequence[tuple[Integers, Integers]], state: int) -> list[Integers]:
    """The whole solution of a state of the last stage in ``history``, the rest at the things of the relaxation."""
    done = [stage.start for stage in stages]
    for depth, (parents, things) in reversed(list(enumerate(history))):
        done[depth] = int(things[state])
        state = int(parents[state])
    by_owner = {stage.owner: stage.item.picks[thing] for stage, thing in zip(stages, done, strict=True)}
    return [by_owner[owner] for owner in range(len(stages))]
