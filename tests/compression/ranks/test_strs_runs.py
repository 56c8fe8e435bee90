"""STRS in whole runs: the losses are those of compressed models, the ranks those of a scan over thresholds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import svdllm
from families import tiny_model
from runs import digests, pair_params, ranks_in, run, small_recipe, token_windows
from svdllm.compression.probe import probe_ids, probe_sizes, probe_tokens
from svdllm.models.discover import discover
from svdllm.models.skeleton import build_skeleton
from svdllm.models.structure import Structure

STRS = {"allocation": "strs", "probe_share": 0.97, "strs_ratios": (0.2, 0.45, 0.7)}


def probes_of(folder: Path, allocation: str = "strs") -> dict[str, dict[int, float]]:
    content = json.loads((folder / f"probes-{allocation}.json").read_text())
    return {name: dict(measured) for name, measured in content.items()}


def structure_of(model: Any) -> Structure:
    return discover(build_skeleton(model.config))


def loss_of(model: Any, ids: Tensor) -> float:
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def scanned(structure: Structure, losses: dict[str, dict[int, float]], budget: float) -> dict[str, int]:
    """The ranks of the first threshold, from the lowest, whose model fits; all linears of the budget are free."""
    for threshold in sorted({loss for measured in losses.values() for loss in measured.values()}):
        passing = {name: [r for r, loss in measured.items() if loss <= threshold] for name, measured in losses.items()}
        ranks = {name: min(found) for name, found in passing.items() if found}
        kept = sum(
            pair_params(t, ranks[t.name]) if t.name in ranks else t.num_weights
            for t in structure.targets
            if t.name in losses
        )
        if kept <= budget:
            return ranks
    raise AssertionError("no threshold fits")


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"method": "asvd"}),
        ("llama", {"method": "svd", "round_to": 2}),
        ("gpt2", {"method": "fwsvd"}),
        ("qwen2", {"metric": "two-sided", "shrinkage": 0.1}),
    ],
)
def test_losses_are_those_of_compressed_models_and_ranks_those_of_a_scan(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model, ids = tiny_model(family), token_windows()
    structure = structure_of(model)
    recipe = small_recipe(ratio=(0.2, 0.35, 0.6), **settings, **STRS)
    folder = tmp_path / "analysis"
    results = svdllm.compress_many(model, recipe, tmp_path / "out", calibration=ids, analysis_dir=folder)
    losses = probes_of(folder)
    assert {name: list(measured) for name, measured in losses.items()} == probe_sizes(recipe, structure)
    for result, ratio in zip(results, (0.2, 0.35, 0.6), strict=True):
        ranks = ranks_in(result.plan.forms)
        assert ranks == scanned(structure, losses, (1 - ratio) * structure.num_target_params)
        assert result.plan.achieved_ratio >= ratio
        assert result.plan.allocation.threshold == max(losses[name][rank] for name, rank in ranks.items())

    probed = probe_ids(ids, probe_tokens(recipe, structure, build_skeleton(model.config)))
    assert probed.numel() > 32
    for index, target in enumerate(structure.targets[::3]):
        rank = list(losses[target.name])[index % 3]
        alone = small_recipe(ranks={f"^{target.name}$": rank}, **settings | {"round_to": 1})
        small = run(model, tmp_path / target.name, ids=ids, recipe=alone)
        assert losses[target.name][rank] == pytest.approx(loss_of(small.load(), probed), rel=1e-5)


@pytest.mark.parametrize("budget", [{"target_params": 13_000}, {"target_size": 60_000}])
def test_budgets_of_the_whole_model_overrides_and_what_is_ignored(budget: dict[str, int], tmp_path: Path) -> None:
    model, ids, folder = tiny_model("llama"), token_windows(), tmp_path / "analysis"
    overrides = {r"0\.mlp\.down_proj": 0.5, r"1\.mlp\.down_proj": 0.0}
    recipe = small_recipe(method="asvd", ignore=["q_proj"], overrides=overrides, **budget, **STRS)
    result = run(model, tmp_path / "out", ids=ids, recipe=recipe, analysis_dir=folder)
    losses, ranks = probes_of(folder), ranks_in(result.plan.forms)
    assert ranks.pop("model.layers.0.mlp.down_proj") == 9  # 0.5 * 32 * 48 / 80 = 9.6
    free = {name: measured for name, measured in losses.items() if "down_proj" not in name}
    assert ranks
    assert set(ranks) <= set(free)
    fixed_saved = 32 * 48 - 9 * 80
    outside = (
        model.num_parameters() - fixed_saved - sum(t.num_weights for t in structure_of(model).targets if t.name in free)
    )
    if "target_params" in budget:
        assert result.load().num_parameters() <= 13_000
        assert ranks == scanned(structure_of(model), free, 13_000 - outside)
    else:
        assert (tmp_path / "out" / "model.safetensors").stat().st_size <= 60_000


def test_plain_svd_reads_text_for_the_probes_only(tmp_path: Path) -> None:
    model = tiny_model("llama")
    results = {
        seed: run(model, tmp_path / str(seed), ids=token_windows(seed=seed), recipe=small_recipe(method="svd", **STRS))
        for seed in (0, 1)
    }
    reports = [json.loads((tmp_path / str(seed) / "svdllm" / "report.json").read_text()) for seed in (0, 1)]
    assert len({report["source"]["calibration_fingerprint"] for report in reports}) == 2
    assert results[0].plan.allocation.threshold != results[1].plan.allocation.threshold
    kept = [{row["name"]: row["kept_energy"] for row in report["linears"]} for report in reports]
    same = [name for name, chosen in results[0].plan.forms.items() if results[1].plan.forms.get(name) == chosen]
    assert same
    assert [kept[0][name] for name in same] == [kept[1][name] for name in same]
    with pytest.raises(svdllm.InputError, match="nowhere"):
        svdllm.compress(model, small_recipe(method="svd", calibration="nowhere.txt", **STRS), tmp_path / "bad")


def test_a_shared_analysis_keeps_the_probes_of_each_allocation_apart(tmp_path: Path) -> None:
    model, ids, folder = tiny_model("llama"), token_windows(), tmp_path / "analysis"
    for name, settings in {
        "strs": STRS,
        "loss": STRS | {"allocation": "loss", "forms": ("pair",)},
        "other ranks": STRS | {"strs_ratios": (0.3, 0.6), "round_to": 4},
    }.items():
        recipe = small_recipe(method="asvd", **settings)
        shared = run(model, tmp_path / f"{name}-shared", ids=ids, recipe=recipe, analysis_dir=folder)
        run(model, tmp_path / name, ids=ids, recipe=recipe)
        assert digests(tmp_path / name) == digests(tmp_path / f"{name}-shared")
        assert "probe" in shared.seconds
    again = run(model, tmp_path / "again", ids=ids, recipe=recipe, analysis_dir=folder)
    assert "probe" not in again.seconds
    assert set(probes_of(folder, "loss")) == set(probes_of(folder))


def test_a_budget_below_the_highest_ratio_is_refused_before_work(tmp_path: Path) -> None:
    recipe = small_recipe(ratio=0.7, method="asvd", allocation="strs", strs_ratios=(0.6, 0.2))
    with pytest.raises(
        svdllm.InputError, match=r"every linear at its least \(that of ratio 0\.6\).*in --strs-ratios\.$"
    ):
        run(tiny_model("llama"), tmp_path / "out", recipe=recipe)
    assert list(tmp_path.iterdir()) == []


def test_the_plan_counts_every_truncation() -> None:
    """A text of 64 x 48 tokens, all of them probed, at one and at three ranks of each of 14 linears."""
    one, three = (
        svdllm.plan(tiny_model("llama"), small_recipe(samples=64, seqlen=48, **STRS | {"strs_ratios": ratios}))[0]
        for ratios in ((0.5,), (0.3, 0.5, 0.7))
    )
    more = [plan.needs.ram_by_stage["probe"] - plan.needs.ram_by_stage["now"] for plan in (one, three)]
    assert more[1] - more[0] == pytest.approx(2 * 14 * 64 * 48 * 32 * 4, abs=2**20)
    assert three.needs.seconds_by_stage["probe"] == pytest.approx(3 * one.needs.seconds_by_stage["probe"])


def test_few_tokens_are_said(tmp_path: Path) -> None:
    reporter = svdllm.common.progress.Reporter()
    recipe = small_recipe(method="svd", allocation="strs")
    run(tiny_model("llama"), tmp_path / "out", recipe=recipe, reporter=reporter)
    (warning,) = reporter.warnings
    assert warning.startswith("Allocation strs measures the loss of 126 truncations on ")
    assert "--probe-share (now 0.5), or fewer --strs-ratios" in warning
    assert svdllm.plan(tiny_model("llama"), recipe)[0].warnings == [warning]
