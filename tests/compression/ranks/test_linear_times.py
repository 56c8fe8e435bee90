"""A budget of time: allocations against brute force on made-up times, whole runs, and one real measurement."""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import svdllm
from families import tiny_model
from runs import TEXT, digests, run, save_dense, small_recipe, target
from svdllm.cli import main
from svdllm.common.errors import InputError
from svdllm.common.progress import Reporter
from svdllm.comparison.variants import variants_of
from svdllm.compression.ranks import Allocation, Evidence, linear_times
from svdllm.compression.ranks.budget import choose_ranks, require_fast_enough
from svdllm.compression.ranks.linear_times import (
    LinearTimes,
    Shape,
    ShapeTimes,
    isotonic,
    measure_linears,
    measured_ranks,
    shape_of,
)
from svdllm.compression.ranks.loss import losses_of
from svdllm.compression.ranks.predicted_sizes import WrittenFiles
from svdllm.compression.recipe import PLAIN, Recipe
from svdllm.compression.recipe_files import make_recipe
from svdllm.models.discover import discover
from svdllm.models.skeleton import build_skeleton
from svdllm.models.structure import Structure

SHAPES = [(12, 20), (20, 12), (16, 16)]
OUTSIDE = 700


def by_parameters(shape: Shape, rank: int | None) -> int:
    """A time of ten for each product, and one for every parameter."""
    rows, columns, _ = shape
    return 10 + rows * columns if rank is None else 20 + rank * (rows + columns)


def structure_of(*shapes: tuple[int, int]) -> Structure:
    targets = [target(*shape, name=f"b.{index}") for index, shape in enumerate(shapes)]
    return Structure(blocks=("b",), targets=tuple(targets), ignored=(), returns_tuple=(False,))


def times_of(
    structure: Structure, time: Callable[[Shape, int | None], int] = by_parameters, tokens: int = 1, round_to: int = 1
) -> LinearTimes:
    highest = {shape_of(target): target.break_even_rank for target in structure.targets}
    ranks = {shape: list(range(round_to, rank + 1, round_to)) for shape, rank in highest.items()}
    return LinearTimes(
        tokens=tokens,
        device="cpu",
        dtype="float32",
        threads=1,
        outside=OUTSIDE,
        shapes=[ShapeTimes(s, time(s, None), ranks[s], [time(s, rank) for rank in ranks[s]]) for s in highest],
    )


def evidence_for(structure: Structure, times: LinearTimes, seed: int) -> Evidence:
    generator = np.random.default_rng(seed)
    energies = {
        t.name: torch.tensor(np.sort(generator.lognormal(0, 2, t.full_rank))[::-1].copy()) for t in structure.targets
    }
    return Evidence(energies, {t.name: {1: float(generator.lognormal(-2, 1))} for t in structure.targets}, times)


def recipe_of(**settings: Any) -> Recipe:
    return Recipe(**(PLAIN | {"allocation": "loss"} | settings))


def allocate(recipe: Recipe, structure: Structure, evidence: Evidence | None) -> Allocation:
    return choose_ranks(recipe, structure, WrittenFiles({}, structure.targets), evidence)


def test_times_between_measured_ranks_and_of_the_whole_by_hand() -> None:
    structure = structure_of((12, 20), (20, 12))
    times = LinearTimes(
        tokens=3,
        device="cpu",
        dtype="float32",
        threads=2,
        outside=100,
        shapes=[
            ShapeTimes(Shape(12, 20, False), 1000, [2, 6], [400, 800]),
            ShapeTimes(Shape(20, 12, False), 600, [1], [900]),
        ],
    )
    wide, tall = structure.targets
    assert [times.of(wide, rank) for rank in (None, 2, 3, 5, 6)] == [1000, 400, 500, 700, 800]
    assert [times.of(tall, rank) for rank in (None, 1)] == [600, 900]
    assert times.total(structure.targets, {}) == 1700
    assert times.total(structure.targets, {"b.0": 3}) == 1200
    speed = times.speed(structure.targets, {"b.0": 3})
    assert (speed.tokens, speed.dense_ns, speed.compressed_ns) == (3, 1700, 1200)
    assert speed.speedup == pytest.approx(1.41667, abs=1e-5)


def test_times_survive_their_file(tmp_path: Path) -> None:
    times = times_of(structure_of(*SHAPES), tokens=7)
    (tmp_path / "times.json").write_text(times.to_json())
    assert LinearTimes.read(tmp_path / "times.json") == times


def test_noise_does_not_make_a_higher_rank_cheaper() -> None:
    assert isotonic([1.0, 2.0, 4.0]) == [1, 2, 4]
    assert isotonic([1.0, 8.0, 4.0, 6.0, 9.0]) == [1, 6, 6, 7, 9]  # above 1 8 8 8 9, below 1 4 4 6 9
    assert isotonic([]) == []


def test_measured_ranks_go_from_the_least_to_break_even() -> None:
    assert measured_ranks(7, 8) == []
    assert measured_ranks(31, 8) == [8, 16, 24]
    ranks = measured_ranks(418, 8)
    assert (len(ranks), ranks[0], ranks[-1]) == (12, 8, 416)
    assert all(rank % 8 == 0 for rank in ranks)
    assert len(set(np.diff(ranks))) <= 2 + 1


@pytest.mark.parametrize("seed", range(12))
def test_no_other_ranks_are_as_fast_and_lose_less(seed: int) -> None:
    """Of three linears whose times follow no law, some slower factored than dense."""
    generator = np.random.default_rng(seed)
    table = {(shape, rank): int(generator.integers(50, 400)) for shape in SHAPES for rank in range(1, 9)}
    dense = {shape: int(generator.integers(200, 400)) for shape in SHAPES}

    def time(shape: Shape, rank: int | None) -> int:
        return dense[shape[:2]] if rank is None else sum(table[shape[:2], r] for r in range(1, rank + 1)) // 3

    structure = structure_of(*SHAPES)
    times = times_of(structure, time)
    evidence = evidence_for(structure, times, seed)
    losses = {t.name: losses_of(evidence, t) for t in structure.targets}
    options = [[None, *range(1, t.break_even_rank + 1)] for t in structure.targets]
    names = [t.name for t in structure.targets]
    for speedup in (1.05, 1.15, 1.25):
        budget = times.total(structure.targets, {}) / speedup
        fitting = [
            sum(float(losses[name][rank]) for name, rank in zip(names, ranks, strict=True) if rank is not None)
            for ranks in itertools.product(*options)
            if OUTSIDE + sum(times.of(t, r) for t, r in zip(structure.targets, ranks, strict=True)) <= budget
        ]
        if not fitting:
            with pytest.raises(InputError, match="cannot be met"):
                allocate(recipe_of(target_speedup=speedup), structure, evidence)
            continue
        found = allocate(recipe_of(target_speedup=speedup), structure, evidence)
        assert found.predicted_loss == pytest.approx(min(fitting))
        assert found.predicted_loss == pytest.approx(sum(float(losses[n][r]) for n, r in found.ranks.items()))
        assert times.speed(structure.targets, found.ranks).speedup >= speedup


def test_what_is_no_faster_factored_stays_dense() -> None:
    structure = structure_of((16, 16), (12, 20))

    def time(shape: Shape, rank: int | None) -> int:
        return 100 if rank is not None and shape[:2] == (16, 16) else 10 * by_parameters(shape, rank) // 24

    times = times_of(structure, time)
    flat = {t.name: torch.ones(t.full_rank, dtype=torch.float64) for t in structure.targets}
    assert times.of(structure.targets[0], None) == 110  # rank 1 saves a tenth, and any rank saves as much
    evidence = Evidence(flat, {"b.0": {1: 1e-9}, "b.1": {1: 9.0}}, times)
    slow = replace(times, shapes=[replace(times.shapes[0], dense=100), times.shapes[1]])
    assert allocate(recipe_of(target_speedup=1.001), structure, evidence).ranks == {"b.0": 7}
    assert set(allocate(recipe_of(target_speedup=1.001), structure, replace(evidence, times=slow)).ranks) == {"b.1"}


def test_overrides_count_with_the_time_that_they_take() -> None:
    structure = structure_of(*SHAPES)
    recipe = recipe_of(target_speedup=1.2, overrides={"b.0": 0.0, "b.1": 0.5})
    times = times_of(structure)
    ranks = allocate(recipe, structure, evidence_for(structure, times, 1)).ranks
    assert ranks.pop("b.1") == 3  # half of 240 over 32, rounded down
    dense = 700 + 250 + 250 + 266
    left = dense / 1.2 - 700 - 250 - (20 + 3 * 32)  # 155.7: (155.7 - 20) / 32 ranks
    assert ranks == {"b.2": int((left - 20) / 32)} == {"b.2": 4}


def test_a_speed_out_of_reach_is_refused_with_one_that_is_not() -> None:
    structure = structure_of(*SHAPES)
    times = times_of(structure, tokens=1024)
    dense, least = 700 + 2 * 250 + 266, 700 + 3 * (20 + 32)
    with pytest.raises(
        InputError,
        match=r"--target-speedup 2 cannot be met: of the dense linears' time for 1,024 tokens at once, 48% lie outside "
        r"the compressed linears, and with every rank at its least \(1\), or dense where that is faster, 58% are left. "
        r"Ask for 1.71 or less.",
    ):
        require_fast_enough(recipe_of(target_speedup=2), structure, times)
    assert 1.71 < dense / least < 1.72
    require_fast_enough(recipe_of(target_speedup=1.71), structure, times)
    assert set(
        allocate(recipe_of(target_speedup=1.71), structure, evidence_for(structure, times, 0)).ranks.values()
    ) == {1}
    never = times_of(structure, lambda shape, rank: 100 if rank is None else 100 + rank)
    with pytest.raises(InputError, match=r"100% are left\. Give another budget"):
        require_fast_enough(recipe_of(target_speedup=1.01), structure, never)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"target_speedup": 1.0}, "target_speedup: Input should be greater than 1"),
        ({"target_speedup": float("inf")}, "target_speedup: Input should be a finite number"),
        ({"target_speedup": 1.2, "ratio": 0.2}, "ratio and target_speedup are given together"),
        ({"target_speedup": 1.2, "speedup_tokens": 0}, "speedup_tokens: Input should be greater than or equal to 1"),
        ({"ratio": 0.2, "speedup_tokens": 8}, "speedup_tokens does nothing without target_speedup"),
        ({"target_speedup": 1.2, "allocation": "uniform"}, "allocation uniform does not count; use allocation loss"),
        ({"target_speedup": 1.2, "method": "svd"}, "allocation uniform does not count"),
        ({"target_speedup": 1.2, "elastic": True}, "the budget is target_speedup; give a ratio"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        make_recipe(settings)


# --- whole runs ---

FAST = {"target_speedup": 1.25, "allocation": "loss", "probe_share": 0.9, "round_to": 2}


@pytest.fixture
def made_up_times(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """In place of the measurement; a second one would find everything dense three times as fast."""
    calls: list[int] = []

    def measure(skeleton: Any, structure: Structure, *, tokens: int, round_to: int, **_: Any) -> LinearTimes:
        calls.append(tokens)
        hurry = 1 if len(calls) == 1 else 3
        return times_of(
            structure, lambda s, r: by_parameters(s, r) // (hurry if r is None else 1), tokens=tokens, round_to=round_to
        )

    # The name svdllm.compress is the function's.
    monkeypatch.setattr(importlib.import_module("svdllm.compression.allocate"), "measure_linears", measure)
    return calls


def fast_recipe(**settings: Any) -> Recipe:
    return small_recipe(**FAST | settings)


def test_a_run_is_as_fast_as_asked_and_says_so(made_up_times: list[int], tmp_path: Path) -> None:
    model = tiny_model("llama")
    structure = discover(build_skeleton(model.config), ["q_proj"])
    recipe = fast_recipe(ignore=["q_proj"], speedup_tokens=5)
    result = run(model, tmp_path / "out", recipe=recipe)
    times = times_of(structure, tokens=5, round_to=2)
    assert made_up_times == [5]
    assert 1.25 <= times.speed(structure.targets, result.plan.ranks).speedup < 1.3
    assert all(rank % 2 == 0 for rank in result.plan.ranks.values())
    report = json.loads((tmp_path / "out" / "svdllm" / "report.json").read_text())
    assert report["speed"]["speedup"] == times.speed(structure.targets, result.plan.ranks).speedup
    assert report["speed"]["dense_ns"] == times.total(structure.targets, {})
    assert report["linear_times"] == json.loads(times.to_json())
    assert report["recipe"]["target_speedup"] == 1.25
    assert result.to_dict()["speed"] == report["speed"]


def test_a_run_that_goes_on_chooses_by_the_times_it_measured_first(made_up_times: list[int], tmp_path: Path) -> None:
    class Interrupted(Reporter):
        def end_stage(self, name: str) -> None:
            if name == "probe":
                raise KeyboardInterrupt

    model = save_dense(tmp_path / "dense")
    straight = run(model, tmp_path / "straight", recipe=fast_recipe())
    made_up_times.clear()
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out", recipe=fast_recipe(), reporter=Interrupted())
    assert (tmp_path / "out.partial" / "analysis" / "linear-times.json").is_file()
    with pytest.raises(InputError, match=r"target_speedup was 1\.25, is now 1\.5"):
        run(model, tmp_path / "out", recipe=fast_recipe(target_speedup=1.5))
    resumed = run(model, tmp_path / "out", recipe=fast_recipe())
    assert len(made_up_times) == 1
    assert resumed.plan.ranks == straight.plan.ranks
    assert digests(tmp_path / "out") == digests(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "again", recipe=fast_recipe(), reporter=Interrupted())
    other = run(model, tmp_path / "again", recipe=fast_recipe(), resume=False)
    assert other.plan.ranks != straight.plan.ranks  # measured anew


def test_a_speed_out_of_reach_costs_no_calibration(made_up_times: list[int], tmp_path: Path) -> None:
    class Watching(Reporter):
        def start_stage(self, name: str, steps: int) -> None:
            assert name in ("plan", "open", "tokenise", "check weights", "time linears")

    with pytest.raises(InputError, match="--target-speedup 50 cannot be met"):
        run(tiny_model("llama"), tmp_path / "out", recipe=fast_recipe(target_speedup=50), reporter=Watching())
    assert made_up_times == [1]
    assert list(tmp_path.iterdir()) == []


def test_times_of_the_linears_decide_not_their_parameters(made_up_times: list[int], tmp_path: Path) -> None:
    """Factored only to save time: what an analysis of the same text would choose by size is another matter."""
    model, folder = tiny_model("llama"), tmp_path / "analysis"
    by_time = run(model, tmp_path / "time", recipe=fast_recipe(), analysis_dir=folder)
    by_size = run(model, tmp_path / "size", recipe=small_recipe(**FAST | {"target_speedup": None}), analysis_dir=folder)
    assert made_up_times == [1]
    assert by_time.plan.speed is not None
    assert by_size.plan.speed is None
    assert by_time.plan.ranks != by_size.plan.ranks


def test_before_the_times_are_known_uniform_ranks_stand_in() -> None:
    model = tiny_model("llama")
    (plan,) = svdllm.plan(model, fast_recipe())
    (uniform,) = svdllm.plan(model, small_recipe(ratio=0.2))
    assert not plan.ranks_known
    assert plan.speed is None
    assert plan.ranks == uniform.ranks
    assert plan.needs.disk_bytes >= plan.sizes.dense_file_bytes
    assert plan.needs.seconds_by_stage["time linears"] > 0 == uniform.needs.seconds_by_stage["time linears"]
    (extreme,) = svdllm.plan(model, fast_recipe(target_speedup=1000))
    assert set(extreme.ranks.values()) == {1}


def test_the_command_line_says_what_is_predicted(
    made_up_times: list[int], tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def cli(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as done:
            main(list(map(str, arguments)))
        printed = capsys.readouterr()
        return int(done.value.code or 0), " ".join((printed.out + printed.err).split())

    model = save_dense(tmp_path / "dense", tokenizer=tokenizer)
    (tmp_path / "text.txt").write_text(TEXT)
    text = ("--calib", tmp_path / "text.txt", "--samples", 8, "--seqlen", 16)
    options = ("--target-speedup", 1.2, "--round-to", 2, *text)
    code, said = cli("plan", model, "--target-speedup", 1.2, "--round-to", 2, "--samples", 8, "--seqlen", 16)
    assert code == 0
    assert "loss, linears 1.2 times as fast: ranks and size follow from the analysis and from times" in said
    code, said = cli("compress", model, "-o", tmp_path / "out", *options)
    assert code == 0
    assert "linears, predicted 1.2" in said
    assert "ms for a token, on cpu in float32" in said
    code, said = cli("inspect", tmp_path / "out")
    assert code == 0
    assert "linears, predicted 1.2" in said
    recipe = tmp_path / "out" / "svdllm" / "recipe.yaml"
    code, said = cli("plan", model, "--recipe", recipe, "--speedup-tokens", 64)
    assert code == 0
    assert "1.2 times as fast" in said
    assert cli("plan", model, "--recipe", recipe, "--ratio", 0.3)[0] == 0
    code, said = cli("compress", model, "-o", tmp_path / "bad", *text, "--preset", "paper", "--target-speedup", 1.2)
    assert code == 2
    assert "use allocation loss" in said


def test_a_recipe_with_a_budget_of_time_is_one_method_of_a_comparison(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(fast_recipe(speedup_tokens=64).to_yaml())
    (variant,) = variants_of([str(file)], {}, teacher="dense")
    assert variant.at(0.3).ratio == 0.3
    assert variant.recipe.target_speedup is None


# --- a real measurement, of which only what must be so is asserted ---


@pytest.mark.parametrize(("family", "tokens"), [("llama", 1), ("gpt2", 3)])
def test_measured_times_rise_with_the_rank(family: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_times, "COLD_BYTES", 2**20)
    monkeypatch.setattr(linear_times, "SECONDS", 0.0)
    skeleton = build_skeleton(tiny_model(family).config)
    structure = discover(skeleton)
    state = torch.get_rng_state()
    times = measure_linears(
        skeleton,
        structure,
        tokens=tokens,
        round_to=2,
        device=torch.device("cpu"),
        dtype=torch.float32,
        reporter=Reporter(),
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert (times.tokens, times.device, times.dtype) == (tokens, "cpu", "float32")
    assert times.outside > 0  # the head
    for linear in structure.targets:
        ranks = range(2, linear.break_even_rank // 2 * 2 + 1)
        taken = [times.of(linear, rank) for rank in ranks]
        assert taken[0] > 0
        assert taken == sorted(taken)
        assert times.of(linear, None) > 0
    assert {shape.shape.is_conv1d for shape in times.shapes} == ({True, False} if family == "gpt2" else {False})


def test_consecutive_products_read_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_times, "COLD_BYTES", 2**23)
    watch = linear_times._Watch([Shape(500, 300, False)], 1, torch.device("cpu"), torch.float32)
    starts = [watch._linear(Shape(500, 300, False), rank)[0].data_ptr() for rank in [None] * 8 + [7] * 40]
    assert len(set(starts)) == len(starts)
    assert all(start % 64 == starts[0] % 64 for start in starts)
    (dense,) = watch._linear(Shape(500, 300, True), None)
    assert dense.shape == (500, 300)
    assert dense.stride() == (1, 500)
    first, second = watch._linear(Shape(500, 300, True), 7)
    assert (first.shape, second.shape) == ((7, 300), (500, 7))
    assert first.is_contiguous()
    assert second.is_contiguous()
