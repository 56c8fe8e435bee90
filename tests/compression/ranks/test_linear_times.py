"""A budget of time: allocations against brute force on made-up times, whole runs, and one real measurement."""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import svdllm
from families import tiny_model
from runs import TEXT, digests, run, save_dense, small_recipe, target
from svdllm.cli import main
from svdllm.common.errors import InputError
from svdllm.common.progress import Reporter
from svdllm.comparison.variants import variants_of
from svdllm.compression.forms import FORMS
from svdllm.compression.math.linalg import tail_energies
from svdllm.compression.ranks import Allocation, Evidence, measure_linears
from svdllm.compression.ranks.budget import choose_forms, require_fast_enough
from svdllm.compression.ranks.linear_times import Curve, LinearTimes, Shape, ShapeTimes, shape_of
from svdllm.compression.ranks.loss import predicted_losses
from svdllm.compression.ranks.measure_linears import isotonic, measured_sizes, work_bytes
from svdllm.compression.ranks.predicted_sizes import WrittenFiles
from svdllm.compression.recipe import PLAIN, Recipe
from svdllm.compression.recipe_files import make_recipe
from svdllm.models.chosen import Chosen
from svdllm.models.discover import discover
from svdllm.models.linears import linear_shape
from svdllm.models.low_rank import LowRankLinear, PackedLinear
from svdllm.models.skeleton import build_skeleton
from svdllm.models.structure import Mlp, Structure, Target, with_mlps

SHAPES = [(12, 20), (20, 12), (16, 16)]
OUTSIDE = 700
SQUARE = Mlp(name="mlp", block=0, producers=("b.0",), consumer="b.1", width=12)


Time = Callable[[Shape, Chosen | None], int]


def pair(rank: int) -> Chosen:
    return Chosen("pair", rank)


def by_parameters(shape: Shape, chosen: Chosen | None) -> int:
    """A time of ten for each product, and one for every parameter."""
    rows, columns = shape[:2]
    if chosen is None:
        return 10 + rows * columns
    if chosen.form == "narrow":
        return 10 + chosen.size * shape.copies * (columns if shape.inner == "out" else rows)
    return 20 + chosen.size * (rows + columns - (chosen.size if chosen.form == "packed" else 0))


def structure_of(*shapes: tuple[int, int]) -> Structure:
    targets = [target(*shape, name=f"b.{index}") for index, shape in enumerate(shapes)]
    return Structure(blocks=("b",), targets=tuple(targets), num_outputs=(0,))


def times_of(
    structure: Structure,
    time: Time = by_parameters,
    tokens: int = 1,
    round_to: int = 1,
    forms: Sequence[str] = ("pair",),
) -> LinearTimes:
    def curve(shape: Shape, form: str, sizes: Sequence[int]) -> Curve:
        return Curve(list(sizes), [time(shape, Chosen(form, size)) for size in sizes])

    by_shape = {shape_of(target): target for target in structure.targets}
    sizes = {shape: {f: FORMS[f].sizes(target, round_to) for f in forms} for shape, target in by_shape.items()}
    return LinearTimes(
        tokens=tokens,
        device="cpu",
        dtype="float32",
        threads=1,
        outside=OUTSIDE,
        shapes=[
            ShapeTimes(s, time(s, None), {f: curve(s, f, some) for f, some in found.items() if some})
            for s, found in sizes.items()
        ],
    )


def evidence_for(structure: Structure, times: LinearTimes, seed: int) -> Evidence:
    generator = np.random.default_rng(seed)
    energies = {
        t.name: torch.tensor(np.sort(generator.lognormal(0, 2, t.full_rank))[::-1].copy()) for t in structure.targets
    }
    return Evidence(energies, {t.name: {1: float(generator.lognormal(-2, 1))} for t in structure.targets}, times)


def losses_by_probe(evidence: Evidence) -> dict[str, Tensor]:
    return {
        name: predicted_losses(tail_energies(energies), *next(iter(evidence.probes[name].items())))
        for name, energies in evidence.energies.items()
    }


def recipe_of(**settings: Any) -> Recipe:
    return Recipe(**(PLAIN | {"allocation": "loss", "forms": ["pair"]} | settings))


def allocate(recipe: Recipe, structure: Structure, evidence: Evidence | None) -> Allocation:
    return choose_forms(recipe, structure, WrittenFiles({}, structure.targets), evidence)


def test_times_between_measured_sizes_and_of_the_whole_by_hand() -> None:
    structure = structure_of((12, 20), (20, 12))
    times = LinearTimes(
        tokens=3,
        device="cpu",
        dtype="float32",
        threads=2,
        outside=100,
        shapes=[
            ShapeTimes(
                Shape(12, 20, False),
                1000,
                {"pair": Curve([2, 6], [400, 800]), "packed": Curve([1, 3, 9], [300, 500, 1100])},
            ),
            ShapeTimes(Shape(20, 12, False), 600, {"pair": Curve([1], [900])}),
        ],
    )
    wide, tall = structure.targets
    assert times.of(wide, None) == 1000
    assert [times.of(wide, pair(rank)) for rank in (2, 3, 5, 6)] == [400, 500, 700, 800]
    assert [times.of(wide, Chosen("packed", rank)) for rank in (1, 2, 6, 9)] == [300, 400, 800, 1100]
    assert [times.of(tall, chosen) for chosen in (None, pair(1))] == [600, 900]
    assert times.total(structure.targets, {}) == 1700
    assert times.total(structure.targets, {"b.0": pair(3)}) == 1200
    speed = times.speed(structure.targets, {"b.0": pair(3)})
    assert (speed.tokens, speed.dense_ns, speed.compressed_ns) == (3, 1700, 1200)
    assert speed.speedup == pytest.approx(1.41667, abs=1e-5)


def test_the_side_of_the_inner_features_tells_linears_of_one_shape_apart() -> None:
    """Both linears of a square MLP are 12 x 12; at width 5 the first has 5 outputs and the second 5 inputs."""
    structure = with_mlps(structure_of((12, 12), (12, 12), (12, 12)), [SQUARE])
    shapes = [shape_of(target) for target in structure.targets]
    assert shapes == [Shape(12, 12, False, "out", 1), Shape(12, 12, False, "in", 1), Shape(12, 12, False)]
    fused = with_mlps(structure_of((24, 12), (12, 12)), [SQUARE])
    assert shape_of(fused.targets[0]) == Shape(24, 12, False, "out", 2)


def test_times_survive_their_file(tmp_path: Path) -> None:
    times = times_of(structure_of(*SHAPES), tokens=7, forms=("pair", "packed"))
    (tmp_path / "times.json").write_text(times.to_json())
    assert LinearTimes.read(tmp_path / "times.json") == times


def test_noise_does_not_make_a_higher_rank_cheaper() -> None:
    assert isotonic([1.0, 2.0, 4.0]) == [1, 2, 4]
    assert isotonic([1.0, 8.0, 4.0, 6.0, 9.0]) == [1, 6, 6, 7, 9]  # above 1 8 8 8 9, below 1 4 4 6 9
    assert isotonic([]) == []


def test_measured_sizes_go_from_the_least_to_the_largest() -> None:
    (linear,) = structure_of((576, 1536)).targets
    (small,) = structure_of((60, 66)).targets  # break-even at 31
    assert measured_sizes([small], ["pair"], 32) == {}
    assert measured_sizes([small], ["pair"], 8) == {"pair": [8, 16, 24]}
    sizes = measured_sizes([linear], ["dense", "pair", "packed", "narrow"], 8)
    assert list(sizes) == ["pair", "packed"]
    assert (len(sizes["pair"]), sizes["pair"][0], sizes["pair"][-1]) == (8, 8, 416)
    assert (len(sizes["packed"]), sizes["packed"][0], sizes["packed"][-1]) == (8, 8, 568)
    assert all(rank % 8 == 0 for ranks in sizes.values() for rank in ranks)
    assert max(np.diff(sizes["packed"])) - min(np.diff(sizes["packed"])) <= 8
    # A bias correction makes the pairs of one of two linears of a shape smaller.
    corrected = replace(small, bias_corrected=True)
    assert corrected.break_even_rank == 30
    assert measured_sizes([corrected, small], ["pair"], 1)["pair"][-1] == 31
    up, down = with_mlps(structure_of((24, 9), (9, 12)), [SQUARE]).targets
    assert measured_sizes([up], ["narrow"], 4) == measured_sizes([down], ["narrow"], 4) == {"narrow": [4, 8]}


@pytest.mark.parametrize("seed", range(12))
def test_no_other_ranks_are_as_fast_and_lose_less(seed: int) -> None:
    """Of three linears whose times follow no law, some slower factored than dense."""
    generator = np.random.default_rng(seed)
    table = {(shape, rank): int(generator.integers(50, 400)) for shape in SHAPES for rank in range(1, 9)}
    dense = {shape: int(generator.integers(200, 400)) for shape in SHAPES}

    def time(shape: Shape, chosen: Chosen | None) -> int:
        if chosen is None:
            return dense[shape[:2]]
        return sum(table[shape[:2], r] for r in range(1, chosen.size + 1)) // 3

    structure = structure_of(*SHAPES)
    times = times_of(structure, time)
    evidence = evidence_for(structure, times, seed)
    losses = losses_by_probe(evidence)
    options = [[None, *map(pair, range(1, t.break_even_rank + 1))] for t in structure.targets]
    for speedup in (1.05, 1.15, 1.25):
        budget = times.total(structure.targets, {}) / speedup
        fitting = []
        for picks in itertools.product(*options):
            forms = {t.name: chosen for t, chosen in zip(structure.targets, picks, strict=True) if chosen is not None}
            if times.total(structure.targets, forms) <= budget:
                fitting.append(sum(float(losses[name][chosen.size]) for name, chosen in forms.items()))
        if not fitting:
            with pytest.raises(InputError, match="cannot be met"):
                allocate(recipe_of(target_speedup=speedup), structure, evidence)
            continue
        found = allocate(recipe_of(target_speedup=speedup), structure, evidence)
        assert found.predicted_loss == pytest.approx(min(fitting))
        assert found.predicted_loss == pytest.approx(sum(float(losses[n][c.size]) for n, c in found.forms.items()))
        assert times.speed(structure.targets, found.forms).speedup >= speedup


@pytest.mark.parametrize("seed", range(6))
def test_no_other_forms_are_as_fast_and_lose_less(seed: int) -> None:
    """Of an MLP, apart or narrower, and one more linear; a random factor is between parameters and times."""
    generator = np.random.default_rng(seed)
    share = {(form, at): generator.uniform(0.6, 1.4) for form in ("pair", "packed", "narrow") for at in range(1, 9)}

    def time(shape: Shape, chosen: Chosen | None) -> int:
        return round(by_parameters(shape, chosen) * (1 if chosen is None else share[chosen.form, chosen.size]))

    forms = ["pair", "packed", "narrow"]
    mlp = Mlp(name="mlp", block=0, producers=("b.0",), consumer="b.1", width=6)
    structure = with_mlps(structure_of((6, 7), (7, 6), (5, 5)), [mlp])
    times = replace(times_of(structure, time, forms=forms), outside=0)
    evidence = evidence_for(structure, times, seed)
    errors = torch.tensor(np.sort(generator.lognormal(0, 1, 7))[::-1].copy())
    errors[-1] = 0.0
    evidence = replace(evidence, narrowings={"mlp": errors}, probes=evidence.probes | {"mlp": {2: 0.3}})
    losses = losses_by_probe(evidence) | {"mlp": predicted_losses(errors, 2, 0.3)}
    options = [
        [None, *(Chosen(f, size) for f in ("pair", "packed") for size in FORMS[f].sizes(t, 1))]
        for t in structure.targets
    ]
    ways = [dict(zip(("b.0", "b.1", "b.2"), picks, strict=True)) for picks in itertools.product(*options)]
    narrower = [Chosen("narrow", width) for width in range(1, 6)]
    ways += [{"b.0": c, "b.1": c, "b.2": last} for c in narrower for last in options[2]]
    for speedup in (1.1, 1.3, 1.6):
        fitting = []
        for way in ways:
            changed = {name: chosen for name, chosen in way.items() if chosen is not None}
            if times.total(structure.targets, changed) <= times.total(structure.targets, {}) / speedup:
                units = {"mlp" if c.form == "narrow" else name: c.size for name, c in changed.items()}
                fitting.append(sum(float(losses[unit][size]) for unit, size in units.items()))
        found = allocate(recipe_of(target_speedup=speedup, forms=forms), structure, evidence)
        assert found.predicted_loss == pytest.approx(min(fitting))
        assert times.speed(structure.targets, found.forms).speedup >= speedup


def test_what_is_no_faster_factored_stays_dense() -> None:
    structure = structure_of((16, 16), (12, 20))

    def time(shape: Shape, chosen: Chosen | None) -> int:
        return 100 if chosen is not None and shape[:2] == (16, 16) else 10 * by_parameters(shape, chosen) // 24

    times = times_of(structure, time)
    flat = {t.name: torch.ones(t.full_rank, dtype=torch.float64) for t in structure.targets}
    assert times.of(structure.targets[0], None) == 110  # rank 1 saves a tenth, and any rank saves as much
    evidence = Evidence(flat, {"b.0": {1: 1e-9}, "b.1": {1: 9.0}}, times)
    slow = replace(times, shapes=[replace(times.shapes[0], dense=100), times.shapes[1]])
    assert allocate(recipe_of(target_speedup=1.001), structure, evidence).forms == {"b.0": pair(7)}
    assert set(allocate(recipe_of(target_speedup=1.001), structure, replace(evidence, times=slow)).forms) == {"b.1"}


def test_overrides_count_with_the_time_that_they_take() -> None:
    structure = structure_of(*SHAPES)
    recipe = recipe_of(target_speedup=1.2, overrides={"b.0": 0.0, "b.1": 0.5})
    times = times_of(structure)
    forms = dict(allocate(recipe, structure, evidence_for(structure, times, 1)).forms)
    assert forms.pop("b.1") == pair(3)  # half of 240 over 32, rounded down
    dense = 700 + 250 + 250 + 266
    left = dense / 1.2 - 700 - 250 - (20 + 3 * 32)  # 155.7: (155.7 - 20) / 32 ranks
    assert forms == {"b.2": pair(int((left - 20) / 32))} == {"b.2": pair(4)}


def test_a_speed_out_of_reach_is_refused_with_one_that_is_not() -> None:
    structure = structure_of(*SHAPES)
    times = times_of(structure, tokens=1024)
    dense, least = 700 + 2 * 250 + 266, 700 + 3 * (20 + 32)
    with pytest.raises(
        InputError,
        match=r"--target-speedup 2 cannot be met: of the dense linears' time for 1,024 tokens at once, 48% lie outside "
        r"the compressed linears, and with every linear at its least \(1\), or dense where that is faster, 58% are "
        r"left. Ask for 1.71 or less.",
    ):
        require_fast_enough(recipe_of(target_speedup=2), structure, times)
    assert 1.71 < dense / least < 1.72
    require_fast_enough(recipe_of(target_speedup=1.71), structure, times)
    assert set(
        allocate(recipe_of(target_speedup=1.71), structure, evidence_for(structure, times, 0)).forms.values()
    ) == {pair(1)}
    never = times_of(structure, lambda shape, chosen: 100 if chosen is None else 100 + chosen.size)
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

FAST = {"target_speedup": 1.25, "allocation": "loss", "probe_share": 0.9, "round_to": 2, "forms": ["pair"]}


@pytest.fixture
def made_up_times(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """In place of the measurement; a second one would find everything dense three times as fast."""
    calls: list[int] = []

    def measure(
        skeleton: Any, structure: Structure, *, forms: Sequence[str], tokens: int, round_to: int, **_: Any
    ) -> LinearTimes:
        calls.append(tokens)
        hurry = 1 if len(calls) == 1 else 3

        def time(shape: Shape, chosen: Chosen | None) -> int:
            return by_parameters(shape, chosen) // (hurry if chosen is None else 1)

        return times_of(structure, time, tokens=tokens, round_to=round_to, forms=forms)

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
    assert 1.25 <= times.speed(structure.targets, result.plan.forms).speedup < 1.3
    assert all(chosen.size % 2 == 0 for chosen in result.plan.forms.values())
    report = json.loads((tmp_path / "out" / "svdllm" / "report.json").read_text())
    assert report["speed"]["speedup"] == times.speed(structure.targets, result.plan.forms).speedup
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
    assert resumed.plan.forms == straight.plan.forms
    assert digests(tmp_path / "out") == digests(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "again", recipe=fast_recipe(), reporter=Interrupted())
    other = run(model, tmp_path / "again", recipe=fast_recipe(), resume=False)
    assert other.plan.forms != straight.plan.forms  # measured anew


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
    assert by_time.plan.forms != by_size.plan.forms


def test_before_the_times_are_known_uniform_ranks_stand_in() -> None:
    model = tiny_model("llama")
    (plan,) = svdllm.plan(model, fast_recipe())
    (uniform,) = svdllm.plan(model, small_recipe(ratio=0.2))
    assert not plan.forms_known
    assert plan.speed is None
    assert plan.forms == uniform.forms
    assert plan.needs.disk_bytes >= plan.sizes.dense_file_bytes
    assert plan.needs.seconds_by_stage["time linears"] > 0 == uniform.needs.seconds_by_stage["time linears"]
    (extreme,) = svdllm.plan(model, fast_recipe(target_speedup=1000))
    assert set(extreme.forms.values()) == {pair(1)}


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


def measure(skeleton: PreTrainedModel, structure: Structure, tokens: int = 1) -> LinearTimes:
    return measure_linears.measure_linears(
        skeleton,
        structure,
        forms=["pair", "packed", "narrow"],
        tokens=tokens,
        round_to=2,
        device=torch.device("cpu"),
        dtype=torch.float32,
        reporter=Reporter(),
    )


@pytest.mark.parametrize(("family", "tokens"), [("llama", 1), ("gpt2", 3), ("phi3", 2)])
def test_measured_times_rise_with_the_size(family: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_linears, "COLD_BYTES", 2**20)
    monkeypatch.setattr(measure_linears, "SECONDS", 0.0)
    skeleton = build_skeleton(tiny_model(family).config)
    structure = discover(skeleton)
    state = torch.get_rng_state()
    times = measure(skeleton, structure, tokens)
    assert torch.equal(torch.get_rng_state(), state)
    assert (times.tokens, times.device, times.dtype) == (tokens, "cpu", "float32")
    assert times.outside > 0  # the head
    assert structure.mlps
    for linear in structure.targets:
        assert times.of(linear, None) > 0
        for form in ("pair", "packed", "narrow") if linear.inner else ("pair", "packed"):
            sizes = FORMS[form].sizes(linear, 2)
            taken = [times.of(linear, Chosen(form, size)) for size in range(sizes[0], sizes[-1] + 1)]
            assert taken[0] > 0
            assert taken == sorted(taken)
    assert {shape.shape.is_conv1d for shape in times.shapes} == ({True, False} if family == "gpt2" else {False})


@pytest.mark.parametrize("is_conv1d", [False, True])
def test_what_is_timed_are_the_modules_that_run(is_conv1d: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 24 x 9 projection with two copies of 12 inner features, and the 9 x 12 one that reads them."""
    monkeypatch.setattr(measure_linears, "COLD_BYTES", 2**16)
    targets = [replace(t, is_conv1d=is_conv1d) for t in with_mlps(structure_of((24, 9), (9, 12)), [SQUARE]).targets]
    watch = measure_linears._Watch([shape_of(t) for t in targets], 2, torch.device("cpu"), torch.float32)

    def linear(target: Target, chosen: Chosen | None) -> Any:
        module = watch._linear(shape_of(target), [target], chosen)
        watch._fill(module)
        assert module(torch.ones(2, measure_linears._num_inputs(module, shape_of(target)))).shape[0] == 2
        return module

    up, down = targets
    dense = Conv1D if is_conv1d else nn.Linear
    assert type(linear(up, None)) is dense
    assert linear_shape(linear(up, None)) == (24, 9)
    assert linear_shape(linear(up, Chosen("narrow", 5))) == (10, 9)
    assert linear_shape(linear(down, Chosen("narrow", 5))) == (9, 5)
    assert type(linear(down, Chosen("narrow", 5))) is dense
    factors = linear(up, pair(3))
    assert isinstance(factors, LowRankLinear)
    assert (factors.svd_v.weight.shape, factors.svd_u.weight.shape) == ((3, 9), (24, 3))
    packed = linear(down, Chosen("packed", 4))
    assert isinstance(packed, PackedLinear)
    assert packed.side == FORMS["packed"].entry(down, "b.1", 4)["side"]
    length = len(packed.order)
    assert length == (9 if packed.side == "rows" else 12)
    assert packed.order.sort().values.tolist() == list(range(length)) != packed.order.tolist()


def test_consecutive_linears_read_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_linears, "COLD_BYTES", 2**23)
    (linear,) = structure_of((500, 300)).targets
    watch = measure_linears._Watch([shape_of(linear)], 1, torch.device("cpu"), torch.float32)
    starts = []
    for chosen in [None] * 8 + [pair(7)] * 40:
        module = watch._linear(shape_of(linear), [linear], chosen)
        watch._fill(module)
        starts.append(next(module.parameters()).data_ptr())
    assert len(set(starts)) == len(starts)
    assert all(start % 64 == starts[0] % 64 for start in starts)
    for _ in range(2):  # the same linear is given others the next time
        watch._fill(module)
        starts.append(next(module.parameters()).data_ptr())
    assert len(set(starts)) == len(starts)


def test_the_memory_of_the_measurement_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 tokens: of a head as large as the numbers, 100 + 30 features; of a packed 20 x 50, at most 3 * 20 + 2 * 50."""
    monkeypatch.setattr(measure_linears, "COLD_BYTES", 2**10)
    linears = structure_of((20, 50)).targets
    assert work_bytes(linears, {(20, 50), (100, 30)}, 10, torch.float32) == 4 * 3000 + 4 * 10 * 160
    assert work_bytes(linears, {(20, 50), (400, 3)}, 1, torch.bfloat16) == 2 * 1200 + 2 * 403
    assert work_bytes([], {(2, 3)}, 1, torch.float32) == 2**10 + 4 * 5
