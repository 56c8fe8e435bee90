"""The knapsack against brute force and a table over every cost, of linears alone and of units with alternatives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from svdllm.compression.ranks.knapsack import Choice, Solution, Unit, solve

Choices = dict[str, list[Choice[int]]]
Units = list[Unit[int]]
Maker = Callable[[int, int, int, str], Units]


def some_choices(generator: np.random.Generator, num_choices: int, kind: str) -> list[Choice[int]]:
    """Choices in random order: of convex losses, of losses that need not fall with cost, or of many equal numbers."""
    count = int(generator.integers(1, num_choices + 1))
    if kind == "ties":
        costs, losses = generator.integers(0, 4, count), generator.integers(0, 4, count).astype(float)
    else:
        costs, losses = generator.integers(0, 60, count), generator.exponential(size=count)
    if kind == "convex":
        costs = np.sort(costs)
        losses = np.sort(losses)[::-1].cumsum()[::-1]
    return [Choice(int(i), int(costs[i]), float(losses[i])) for i in generator.permutation(count)]


def linears(seed: int, num_units: int, num_choices: int, kind: str) -> Units:
    """Units with one alternative of one part."""
    generator = np.random.default_rng(seed)
    return [Unit([{f"t{index}": some_choices(generator, num_choices, kind)}]) for index in range(num_units)]


def with_alternatives(seed: int, num_units: int, num_choices: int, kind: str) -> Units:
    """Units with up to three alternatives of up to three parts; a part may be in several alternatives."""
    generator = np.random.default_rng(seed)
    return [
        Unit(
            [
                {
                    f"t{index}.{part}": some_choices(generator, num_choices, kind)
                    for part in generator.permutation(4)[: generator.integers(1, 4)].tolist()
                }
                for _ in range(generator.integers(1, 4))
            ]
        )
        for index in range(num_units)
    ]


def apart(choices: Choices) -> Units:
    return [Unit([{name: options}]) for name, options in choices.items()]


def ways(unit: Unit[int]) -> Iterator[dict[str, Choice[int]]]:
    """Everything that may be done with a unit."""
    for parts in unit.alternatives:
        yield from (dict(zip(parts, picks, strict=True)) for picks in itertools.product(*parts.values()))


def costs_of(unit: Unit[int]) -> list[int]:
    return [sum(choice.cost for choice in way.values()) for way in ways(unit)]


def share_of(units: Units, share: float) -> int:
    """A budget: a share of the most that can be spent."""
    return int(share * sum(max(costs_of(unit)) for unit in units))


def brute_force(units: Units, budget: int) -> float | None:
    """The least loss by trying everything."""
    per_unit = [[list(way.values()) for way in ways(unit)] for unit in units]
    tried = (list(itertools.chain(*picks)) for picks in itertools.product(*per_unit))
    fitting = (choices for choices in tried if sum(c.cost for c in choices) <= budget)
    return min((math.fsum(c.loss for c in choices) for choices in fitting), default=None)


def by_table(units: Units, budget: int) -> float | None:
    """The least loss by dynamic programming over every cost: for more units than can be tried out."""

    def spend(least: np.ndarray, choices: Sequence[Choice[int]]) -> np.ndarray:
        table = np.full(budget + 1, np.inf)
        for option in choices:
            if option.cost <= budget:
                table[option.cost :] = np.minimum(table[option.cost :], least[: budget + 1 - option.cost] + option.loss)
        return table

    least = np.zeros(budget + 1)
    for unit in units:
        tables = []
        for parts in unit.alternatives:
            table = least
            for choices in parts.values():
                table = spend(table, choices)
            tables.append(table)
        least = np.minimum.reduce(tables)
    return None if math.isinf(least[budget]) else float(least[budget])


def check(units: Units, budget: int, solution: Solution[int] | None, optimum: float | None, exact: bool = True) -> None:
    assert (solution is None) == (optimum is None)
    if solution is None or optimum is None:
        return
    rounding = 1e-11 * max(1.0, optimum)
    taken = dict(solution.choices)
    for unit in units:
        mine = {name: taken.pop(name) for name in unit.names if name in taken}
        assert any(
            mine.keys() == parts.keys() and all(mine[name] in parts[name] for name in parts)
            for parts in unit.alternatives
        )
    assert not taken
    assert solution.cost == sum(choice.cost for choice in solution.choices.values()) <= budget
    assert solution.loss == math.fsum(choice.loss for choice in solution.choices.values())
    assert solution.lower_bound <= min(solution.loss, optimum + rounding)
    assert optimum - rounding <= solution.loss
    if exact:
        assert solution.loss <= optimum + rounding
        assert solution.gap == 0


MAKERS = pytest.mark.parametrize("make", [linears, with_alternatives])
KINDS = pytest.mark.parametrize("kind", ["convex", "any", "ties"])


@KINDS
def test_it_finds_what_brute_force_finds(kind: str):
    infeasible = 0
    for seed in range(150):
        units = linears(seed, 1 + seed % 5, 5, kind)
        for share in (0.1, 0.4, 0.8):
            budget = share_of(units, share)
            optimum = brute_force(units, budget)
            infeasible += optimum is None
            check(units, budget, solve(units, budget), optimum)
    assert 10 < infeasible < 300


@KINDS
def test_of_alternatives_it_finds_what_brute_force_finds(kind: str):
    infeasible = 0
    for seed in range(100):
        units = with_alternatives(seed, 1 + seed % 3, 3, kind)
        for share in (0.1, 0.3, 0.6):
            budget = share_of(units, share)
            optimum = brute_force(units, budget)
            infeasible += optimum is None
            check(units, budget, solve(units, budget), optimum)
    assert 10 < infeasible < 200


@KINDS
@MAKERS
@pytest.mark.parametrize("seed", range(6))
def test_it_finds_the_optimum_of_many_units(make: Maker, kind: str, seed: int):
    units = make(seed, 40 if make is linears else 15, 12 if make is linears else 8, kind)
    for share in (0.25, 0.5, 0.75):
        budget = share_of(units, share)
        check(units, budget, solve(units, budget), by_table(units, budget))


@MAKERS
@pytest.mark.parametrize("max_states", [1, 5, 30])
def test_a_search_that_is_cut_short_says_by_how_much_at_most_it_is_off(make: Maker, max_states: int):
    gaps = []
    for seed in range(40):
        units = make(seed, 25 if make is linears else 12, 8, "any")
        budget = share_of(units, 1 / 3 if make is linears else 1 / 5)
        solution = solve(units, budget, max_states=max_states)
        check(units, budget, solution, by_table(units, budget), exact=False)
        if solution is not None:
            assert solution.gap == (solution.loss - solution.lower_bound) / solution.loss
            gaps.append(solution.gap)
    assert 0 <= min(gaps) <= max(gaps) < 0.3
    assert (max(gaps) > 1e-6) or max_states > 1


@MAKERS
def test_more_budget_never_loses_more(make: Maker):
    units = make(3, 12, 8, "any")
    cheapest = sum(min(costs_of(unit)) for unit in units)
    assert solve(units, cheapest - 1) is None
    losses = [s.loss for budget in range(cheapest, cheapest + 800, 4) if (s := solve(units, budget)) is not None]
    assert len(losses) == 200
    assert losses == sorted(losses, reverse=True)
    least = [min(math.fsum(choice.loss for choice in way.values()) for way in ways(unit)) for unit in units]
    assert losses[-1] == pytest.approx(sum(least))


def test_linears_by_hand():
    """Rank 2 of a and dense b cost 9 and lose 1; for 8, b falls back to rank 1, and a has nothing to spend 2 on."""
    a: list[Choice[int | None]] = [Choice(1, 1, 3.0), Choice(2, 3, 1.0)]
    b: list[Choice[int | None]] = [Choice(1, 2, 1.0), Choice(3, 4, 1.0), Choice(None, 6, 0.0)]
    units = [Unit([{"a": a}]), Unit([{"b": b}])]
    assert solve(units, 9) == Solution({"a": a[1], "b": b[2]}, 9, 1.0, 1.0)
    assert solve(units, 8) == Solution({"a": a[1], "b": b[0]}, 5, 2.0, 2.0)
    assert solve(units, 3) == Solution({"a": a[0], "b": b[0]}, 3, 4.0, 4.0)
    assert solve(units, 2) is None


def test_a_unit_with_alternatives_by_hand():
    """Up and down apart cost 2 to 10, the whole MLP narrower 3 or 6: at 6 it loses less, at 2 it is too dear."""
    up, down = [Choice("low", 1, 5.0), Choice("high", 4, 1.0)], [Choice("low", 1, 5.0), Choice("dense", 6, 0.0)]
    whole = [Choice("narrow", 3, 4.0), Choice("wide", 6, 3.5)]
    units = [Unit([{"up": up, "down": down}, {"mlp": whole}])]
    expected = {
        2: {"up": up[0], "down": down[0]},
        3: {"mlp": whole[0]},
        5: {"mlp": whole[0]},
        6: {"mlp": whole[1]},
        9: {"mlp": whole[1]},
        10: {"up": up[1], "down": down[1]},
    }
    for budget, choices in expected.items():
        cost, loss = sum(c.cost for c in choices.values()), sum(c.loss for c in choices.values())
        assert solve(units, budget) == Solution(choices, cost, loss, loss)
    assert solve(units, 1) is None


def test_one_alternative_of_several_parts_is_as_good_as_the_parts_alone():
    for seed in range(30):
        units = linears(seed, 9, 8, "any")
        (budget, parts) = share_of(units, 0.4), [unit.alternatives[0] for unit in units]
        together = [Unit([parts[at] | parts[at + 1] | parts[at + 2]]) for at in (0, 3, 6)]
        assert solve(together, budget) == solve(units, budget)


def test_without_any_loss_the_cheapest_is_taken():
    options = [Choice(0, 7, 0.0), Choice(1, 3, 0.0), Choice(2, 3, 0.0)]
    solution = solve(apart({"a": options, "b": options}), 100)
    assert solution == Solution({"a": options[1], "b": options[1]}, 6, 0.0, 0.0)
    assert solution.gap == 0
    assert solve([], 0) == Solution({}, 0, 0.0, 0.0)


def test_costs_of_a_large_model():
    """Ten times the parameters of a 7B model in bytes: far above 2^32, and a slack of one part of it decides."""
    unit = 10**10
    units = apart({name: [Choice(1, unit, 2.0), Choice(2, 2 * unit + at, 1.0)] for at, name in enumerate("abc")})
    for budget, loss in ((4 * unit - 1, 6.0), (4 * unit, 5.0), (5 * unit, 5.0), (5 * unit + 1, 4.0)):
        solution = solve(units, budget)
        assert solution is not None
        assert solution.loss == loss
    assert solve(units, 3 * unit - 1) is None


@MAKERS
@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_the_units_changes_nothing(make: Maker, seed: int):
    units = make(seed, 12, 6, "ties")
    budget = share_of(units, 0.7)
    first = solve(units, budget)
    assert first is not None
    shuffled = solve([units[at] for at in np.random.default_rng(seed).permutation(len(units))], budget)
    assert first == shuffled
    assert first == solve(units, budget)
    assert list(first.choices) == sorted(first.choices, key=lambda name: int(name[1:].split(".")[0]))


def test_units_that_cannot_be_solved_are_refused():
    one = [Choice(1, 1, 1.0)]
    with pytest.raises(ValueError, match="b has no choice: give at least one rank, or dense"):
        Unit([{"a": one}, {"a": one, "b": []}])
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"a: losses must be finite, got \[0\.0, (nan|inf)\]"):
            Unit([{"a": [Choice(1, 1, 0.0), Choice(2, 2, bad)]}])
    for nothing in ([], [{}], [{"a": one}, {}]):
        with pytest.raises(ValueError, match="A unit needs an alternative, and each of them a part"):
            Unit(nothing)
    with pytest.raises(ValueError, match="Every name must be in one unit only, found in more: a, c"):
        solve([Unit([{"a": one}, {"c": one}]), Unit([{"a": one, "b": one}]), Unit([{"c": one}])], 5)


@MAKERS
def test_costs_and_losses_of_other_scales_change_nothing_but_the_scale(make: Maker):
    def scaled(choices: Sequence[Choice[int]]) -> list[Choice[int]]:
        return [Choice(c.what, 1000 * c.cost + 7, c.loss / 1024) for c in choices]

    for seed in range(20):
        units = make(seed, 10, 6, "any")
        # Every part costs 7 more: the same choices fit where the same number of parts is taken.
        units = [Unit([parts for parts in u.alternatives if len(parts) == len(u.alternatives[0])]) for u in units]
        budget = share_of(units, 0.5)
        small, num_parts = solve(units, budget), sum(len(unit.alternatives[0]) for unit in units)
        others = [Unit([{n: scaled(c) for n, c in parts.items()} for parts in u.alternatives]) for u in units]
        large = solve(others, 1000 * budget + 999 + 7 * num_parts)
        assert (small is None) == (large is None)
        if small is not None and large is not None:
            assert {n: c.what for n, c in small.choices.items()} == {n: c.what for n, c in large.choices.items()}
