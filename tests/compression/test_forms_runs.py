"""Whole runs over all forms: the written model is the dense one with the best matrices of every form put in."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import svdllm
from families import dense_weight, linear_targets, tiny_model
from runs import digests, run, small_recipe, token_windows
from svdllm import InputError, load_model
from svdllm.checkpoint.report import read_report
from svdllm.compression.forms import FORMS
from svdllm.compression.probe import probe_ids, probe_tokens
from svdllm.models.chosen import Chosen
from svdllm.models.discover import discover
from svdllm.models.skeleton import build_skeleton
from svdllm.models.structure import Structure

FAMILIES = ("llama", "qwen2", "gpt2", "opt", "phi3", "gpt_neox", "falcon", "gemma3_text")
IDS = token_windows(samples=32, seqlen=16)
PROBE = token_windows(samples=2, seqlen=12, seed=7)
WIDTH = 19


@pytest.fixture(autouse=True)
def without_ridges(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracles have none."""
    monkeypatch.setattr("svdllm.compression.products.RIDGE", 1e-12)
    monkeypatch.setattr("svdllm.compression.math.narrowing.RIDGES", (1e-14, 1e-6, 1e-5, 1e-4))


def lively(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """A tiny model with weights so large that its activations are far from linear, and their Grams from singular."""
    model = tiny_model(family).to(dtype)
    with torch.no_grad():
        for linear in linear_targets(model).values():
            linear.weight.mul_(8)
    return model


def recipe_of(**settings: Any) -> svdllm.Recipe:
    return small_recipe(samples=32, **settings)


def structure_of(model: Any) -> Structure:
    return discover(build_skeleton(model.config))


def outputs_of(model: Any, ids: Tensor = PROBE) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def inputs_of(model: Any, ids: Tensor = IDS) -> dict[str, Tensor]:
    """Linear -> the tokens that it is handed (``in x T``)."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, args: seen.update({name: args[0].detach().flatten(0, -2).mT})

    names = linear_targets(tiny_model(model.config.model_type.removeprefix("svdllm_")))
    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def explicit(model: Any, kind: str) -> dict[str, Any]:
    """Explicit forms of all linears: of one form, or in the first block other forms than in the second."""
    structure, given = structure_of(model), {}
    if kind in ("narrow", "mixed"):
        mlps = structure.mlps if kind == "narrow" else structure.mlps[:1]
        given |= {f"^{re.escape(mlp.name)}$": {"narrow": WIDTH} for mlp in mlps}
    consumers = {mlp.consumer for mlp in structure.mlps}
    for number, target in enumerate(structure.targets):
        form = kind
        if kind == "mixed":
            form = "packed" if target.name in consumers or number % 3 == 0 else "pair"
        if form != "narrow":
            given[f"^{re.escape(target.name)}$"] = {form: 5 + number % 4}
    return given


def kept_features(written: Tensor, dense: Tensor) -> list[int]:
    """Which rows of a dense matrix were kept: those that are equal, each once."""
    same = (written[:, None] == dense[None]).all(-1)
    assert (same.sum(1) == 1).all()
    return same.int().argmax(1).tolist()


def put_in(dense: Any, written: Any, forms: dict[str, Chosen]) -> Any:
    """The dense model with the best matrices of these forms, by regression on its own inputs and by its SVD."""
    expected, inputs, structure = copy.deepcopy(dense), inputs_of(dense), structure_of(dense)
    best: dict[str, Tensor] = {}
    for name, chosen in forms.items():
        weight_OI = dense_weight(dense.get_submodule(name))
        if chosen.form != "narrow":
            left, _, _ = torch.linalg.svd(weight_OI @ inputs[name], full_matrices=False)
            best[name] = left[:, : chosen.size] @ left[:, : chosen.size].mT @ weight_OI
    for mlp in structure.mlps:
        if forms.get(mlp.consumer, Chosen("dense", 0)).form != "narrow":
            continue
        rows = [
            kept_features(dense_weight(written.get_submodule(name)), dense_weight(dense.get_submodule(name)))
            for name in mlp.producers
        ]
        kept = rows[0][: forms[mlp.consumer].size]
        for own in rows:  # gate and up projection in one matrix keep the same features of both
            assert own == [feature + copies * mlp.width for copies in range(len(own) // len(kept)) for feature in kept]
        weight_OI, x_IT = dense_weight(dense.get_submodule(mlp.consumer)), inputs[mlp.consumer]
        best[mlp.consumer] = torch.zeros_like(weight_OI)
        fitted = torch.linalg.lstsq(x_IT[kept].mT, (weight_OI @ x_IT).mT, driver="gelsd").solution.mT
        best[mlp.consumer][:, kept] = fitted
    with torch.no_grad():
        for name, weight_OI in best.items():
            dense_weight(expected.get_submodule(name)).copy_(weight_OI)
    return expected


@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, "mixed") for family in FAMILIES]
    + [(family, kind) for family in ("llama", "gpt2", "phi3") for kind in ("packed", "narrow")],
)
def test_the_written_model_is_the_dense_one_with_the_best_matrices_put_in(
    family: str, kind: str, tmp_path: Path
) -> None:
    model = lively(family)
    recipe = recipe_of(ranks=explicit(model, kind), dtype="float64")
    (planned,) = svdllm.plan(model, recipe)
    result = run(model, tmp_path / "out", ids=IDS, recipe=recipe)
    written = result.load(dtype=torch.float64).eval()
    assert planned.forms == result.plan.forms
    assert {chosen.form for chosen in planned.forms.values()} == (
        {"narrow", "packed", "pair"} if kind == "mixed" else {kind}
    )
    expected = put_in(model, written, dict(result.plan.forms))
    assert float((outputs_of(expected) - outputs_of(model)).norm()) > 1e-3
    torch.testing.assert_close(outputs_of(written), outputs_of(expected), rtol=1e-5, atol=1e-6)
    assert_sizes(planned, result, written)
    assert svdllm.verify(tmp_path / "out", "cpu")


def assert_sizes(planned: Any, result: Any, written: Any) -> None:
    """A plan, the result, the report, the files and the loaded model agree."""
    files = sum(path.stat().st_size for path in result.output_dir.glob("*.safetensors"))
    report = read_report(result.output_dir)
    params = written.num_parameters()
    assert (planned.params, planned.file_bytes) == (result.plan.params, result.plan.file_bytes) == (params, files)
    assert (report["params"], report["file_bytes"]) == (params, files)
    assert planned.achieved_ratio == result.plan.achieved_ratio == report["achieved_ratio"]
    rows = {row["name"]: row for row in report["linears"]}
    for name, chosen in result.plan.forms.items():
        assert (rows[name]["form"], rows[name]["size"]) == (chosen.form, chosen.size)
        assert (rows[name]["rank"] is None) == (chosen.form == "narrow")
    entries = json.loads((result.output_dir / "config.json").read_text())["svdllm"]
    assert entries["format_version"] == 2
    assert {name: entry["form"] for name, entry in entries["forms"].items()} == {
        name: chosen.form for name, chosen in result.plan.forms.items()
    }


def test_losses_of_narrower_mlps_are_those_of_the_regression(tmp_path: Path) -> None:
    model = lively("llama")
    result = run(model, tmp_path / "out", ids=IDS, recipe=recipe_of(ranks={"mlp": {"narrow": WIDTH}}, dtype="float64"))
    expected, inputs = put_in(model, result.load(dtype=torch.float64), dict(result.plan.forms)), inputs_of(model)
    rows = {row.name: row for row in result.linears}
    for mlp in structure_of(model).mlps:
        x_IT = inputs[mlp.consumer]
        weights = [dense_weight(m.get_submodule(mlp.consumer)) for m in (model, expected)]
        row, loss = rows[mlp.consumer], float(((weights[0] - weights[1]) @ x_IT).norm())
        assert row.loss == pytest.approx(loss, rel=1e-6)
        assert row.relative_loss == pytest.approx(loss / float((weights[0] @ x_IT).norm()), rel=1e-6)
        assert [rows[name].loss for name in mlp.producers] == [0.0] * len(mlp.producers)


ALL_FORMS = {"allocation": "loss", "round_to": 2, "probe_share": 0.9}


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt", "qwen2"])
def test_the_best_forms_of_a_budget(family: str, tmp_path: Path) -> None:
    """Two sizes of one analysis: every form has its share, and the plan is the result."""
    model = lively(family, torch.float32)
    recipe = recipe_of(ratio=(0.25, 0.55), **ALL_FORMS)
    planned = svdllm.plan(model, recipe)
    results = svdllm.compress_many(model, recipe, tmp_path / "out", calibration=IDS)
    used = set()
    for before, result, ratio in zip(planned, results, (0.25, 0.55), strict=True):
        assert not before.forms_known
        assert result.plan.forms_known
        assert 0 <= result.plan.achieved_ratio - ratio < 0.02
        assert before.achieved_ratio == pytest.approx(result.plan.achieved_ratio, abs=0.05)
        written = result.load().eval()
        assert_sizes(result.plan, result, written)
        assert result.plan.allocation.predicted_loss is not None
        assert result.plan.allocation.gap is not None
        assert 0 <= result.plan.allocation.gap < 0.01
        used |= {chosen.form for chosen in result.plan.forms.values()}
        assert torch.isfinite(outputs_of(written)).all()
    assert used >= {"packed", "narrow"}


@pytest.mark.parametrize("budget", [{"target_params": 13_000}, {"target_size": 60_000}])
@pytest.mark.parametrize("forms", [("packed",), ("narrow",), ("pair", "packed", "narrow")], ids=str)
def test_budgets_of_the_whole_model(budget: dict[str, int], forms: tuple[str, ...], tmp_path: Path) -> None:
    recipe = recipe_of(forms=forms, **budget, **ALL_FORMS | {"round_to": 1})
    result = run(lively("llama", torch.float32), tmp_path / "out", ids=IDS, recipe=recipe)
    assert {chosen.form for chosen in result.plan.forms.values()} <= set(forms)
    if "target_params" in budget:
        assert 12_900 < result.load().num_parameters() <= 13_000
    else:
        assert 59_000 < (tmp_path / "out" / "model.safetensors").stat().st_size <= 60_000


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_a_probe_of_an_mlp_is_the_effect_of_narrowing_it(family: str, tmp_path: Path) -> None:
    """The divergence of a model with this MLP narrowed alone, over the tokens that were probed."""
    model, folder = lively(family), tmp_path / "analysis"
    recipe = recipe_of(dtype="float64", **ALL_FORMS)
    run(model, tmp_path / "out", ids=IDS, recipe=recipe, analysis_dir=folder)
    probes = {name: dict(found) for name, found in json.loads((folder / "probes-loss.json").read_text()).items()}
    structure = structure_of(model)
    assert set(probes) == {target.name for target in structure.targets} | {mlp.name for mlp in structure.mlps}
    ids = probe_ids(IDS, probe_tokens(recipe, structure, build_skeleton(model.config)))
    assert ids.numel() > 32
    dense = outputs_of(model, ids).log_softmax(-1)
    for number, mlp in enumerate(structure.mlps):
        ((width, measured),) = probes[mlp.name].items()
        alone = recipe_of(ranks={f"^{re.escape(mlp.name)}$": {"narrow": width}}, dtype="float64")
        narrower = run(model, tmp_path / str(number), ids=IDS, recipe=alone).load(dtype=torch.float64).eval()
        found = outputs_of(narrower, ids).log_softmax(-1)
        divergence = float((dense.exp() * (dense - found)).sum(-1).mean())
        assert measured == pytest.approx(divergence, rel=1e-3)


def test_an_analysis_serves_every_choice_of_its_forms(tmp_path: Path) -> None:
    model, folder = lively("llama", torch.float32), tmp_path / "analysis"
    for number, settings in enumerate(({"ratio": 0.3}, {"ratio": 0.5, "forms": ("packed", "narrow")})):
        recipe = recipe_of(**ALL_FORMS | settings)
        shared = run(model, tmp_path / f"shared-{number}", ids=IDS, recipe=recipe, analysis_dir=folder)
        assert ("analyze" in shared.seconds, "probe" in shared.seconds) == (number == 0, number == 0)
        run(model, tmp_path / f"own-{number}", ids=IDS, recipe=recipe)
        assert digests(tmp_path / f"shared-{number}") == digests(tmp_path / f"own-{number}")
    for forms, named in ((("pair",), "directions of a spectrum"), (("packed",), "narrower MLPs")):
        recipe = recipe_of(forms=forms, **ALL_FORMS)
        with pytest.raises(InputError, match=f"had other settings: .*{named} was"):
            run(model, tmp_path / "other", ids=IDS, recipe=recipe, analysis_dir=folder)
    assert not (tmp_path / "other").exists()


def test_a_form_that_a_model_has_no_place_for(tmp_path: Path) -> None:
    model = lively("llama", torch.float32)
    recipe = recipe_of(ratio=0.3, ignore=("down_proj",), forms=("narrow",), **ALL_FORMS)
    for start in (lambda: svdllm.plan(model, recipe), lambda: run(model, tmp_path / "out", recipe=recipe)):
        with pytest.raises(InputError, match=r"--forms narrow needs MLPs .* Leave narrow out"):
            start()
    assert not list(tmp_path.iterdir())
    by_default = recipe.model_copy(update={"forms": None})
    result = run(model, tmp_path / "out", ids=IDS, recipe=by_default)
    assert {chosen.form for chosen in result.plan.forms.values()} == {"packed"}


# --- sequential calibration ---


def unexplained(wanted_OT: Tensor, seen_IT: Tensor, rank: int | None) -> float:
    """The least squared error of a matrix (of a rank) that makes the wanted outputs of what is seen."""
    fit_OI = torch.linalg.lstsq(seen_IT.mT, wanted_OT.mT, driver="gelsd").solution.mT
    best_OT = fit_OI @ seen_IT
    error = float((wanted_OT - best_OT).square().sum())
    return error if rank is None else error + float(torch.linalg.svdvals(best_OT)[rank:].square().sum())


@pytest.mark.parametrize("share", [0.0, 0.25])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_every_form_is_fitted_to_the_compressed_stream(family: str, share: float, tmp_path: Path) -> None:
    """With beta 1, every linear makes the dense outputs as well as its form can, of the inputs that it really gets.

    A share of the dense Gram counts as that share of dense inputs beside them.
    """
    model = lively(family)
    structure = structure_of(model)
    recipe = recipe_of(
        ranks=explicit(model, "mixed"),
        dtype="float64",
        calibration_mode="sequential",
        beta=1.0,
        sequential_shrinkage=share,
        residual_correction=0.0,
    )
    result = run(model, tmp_path / "out", ids=IDS, recipe=recipe, analysis_dir=tmp_path / "analysis")
    first = load_file(tmp_path / "analysis" / "block-0000.safetensors")
    written = result.load(dtype=torch.float64).eval()
    dense_in, seen_in = inputs_of(model), inputs_of(written)
    checked, moved = set(), {name for mlp in structure.mlps[1:] for name in mlp.producers}
    for target in structure.targets:
        chosen = result.plan.forms[target.name]
        if target.name in moved or (chosen.form == "narrow" and target.inner and target.inner.side == "out"):
            continue  # their outputs come in another order, or in part
        if share and target.name == structure.mlps[1].consumer:
            continue  # its inputs come in another order
        dense_IT, seen_IT = dense_in[target.name], seen_in[target.name]
        wanted_OT = dense_weight(model.get_submodule(target.name)) @ dense_IT
        if chosen.form == "narrow":
            dense_IT = dense_IT[first[f"{structure.mlps[0].name}.order"][:WIDTH]]
        weights = (1 - share) ** 0.5, share**0.5
        wanted_OT = torch.cat([weight * wanted_OT for weight in weights], 1)
        seen_IT = torch.cat([weight * x_IT for weight, x_IT in zip(weights, (seen_IT, dense_IT), strict=True)], 1)
        layer: Any = written.get_submodule(target.name)
        made_OT = layer(seen_IT.mT).detach().mT - layer(torch.zeros_like(seen_IT.mT)).detach().mT
        error = float((wanted_OT - made_OT).square().sum())
        least = unexplained(wanted_OT, seen_IT, None if chosen.form == "narrow" else chosen.size)
        assert error <= least * 1.001 + 1e-9, target.name
        assert error > 1e-9 or chosen.form == "narrow"
        checked.add(chosen.form)
    assert checked == {"pair", "packed", "narrow"}


def test_sequential_calibration_over_all_forms_of_a_budget(tmp_path: Path) -> None:
    model = lively("llama", torch.float32)
    settings = {**ALL_FORMS, "ratio": 0.5, "metric": "two-sided", "gradient_samples": 4, "gradient_shrinkage": 0.3}
    errors = {}
    for mode in ("dense", "sequential"):
        recipe = recipe_of(calibration_mode=mode, shrinkage=0.05, **settings)
        result = run(model, tmp_path / mode, ids=IDS, recipe=recipe)
        assert_sizes(result.plan, result, result.load())
        dense, found = (outputs_of(m, IDS).log_softmax(-1) for m in (model, result.load().eval()))
        errors[mode] = float((dense.exp() * (dense - found)).sum(-1).mean())
    assert errors["sequential"] < errors["dense"]


# --- what is in the files ---


def test_packed_factors_in_the_file_make_the_matrix(tmp_path: Path) -> None:
    """By the formula of the checkpoint page alone, without the library's modules."""
    model = lively("llama")
    given = {r"0\.mlp\.(gate|down)": {"packed": 7}, "self_attn": {"packed": 6}}
    result = run(model, tmp_path / "out", ids=IDS, recipe=recipe_of(ranks=given, dtype="float64"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    entries = json.loads((tmp_path / "out" / "config.json").read_text())["svdllm"]["forms"]
    expected = put_in(model, result.load(dtype=torch.float64), dict(result.plan.forms))
    sides = set()
    for name, entry in entries.items():
        svd_v, svd_u, order = (tensors[f"{name}.{leaf}"] for leaf in ("svd_v.weight", "svd_u.weight", "order"))
        one = torch.eye(entry["rank"], dtype=svd_v.dtype)
        assert order.dtype == torch.int32
        assert max(float(t.abs().max()) for t in ((svd_u,) if entry["side"] == "rows" else (svd_v,))) <= 2 + 1e-9
        if entry["side"] == "rows":
            found = torch.cat((one, svd_u))[order.long()] @ svd_v
        else:
            found = torch.empty(len(svd_u), len(order), dtype=svd_v.dtype)
            found[:, order.long()] = svd_u @ torch.cat((one, svd_v), dim=1)
        sides.add(entry["side"])
        if "self_attn" in name:
            weight = dense_weight(expected.get_submodule(name))
            torch.testing.assert_close(found, weight, rtol=1e-7, atol=1e-9)
    assert sides == {"rows", "columns"}


def test_saved_again_and_loaded_without_a_change(tmp_path: Path) -> None:
    model = lively("gpt2", torch.float32)
    run(model, tmp_path / "out", ids=IDS, recipe=recipe_of(ranks=explicit(model, "mixed")))
    loaded: Any = load_model(tmp_path / "out")
    loaded.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(outputs_of(load_model(tmp_path / "again").eval()), outputs_of(loaded.eval()))


def test_elastic_runs_hold_pairs(tmp_path: Path) -> None:
    """By default; packed or narrower ones are refused by name (tests/compression/test_forms.py)."""
    recipe = recipe_of(elastic=True, **ALL_FORMS)
    result = run(lively("llama", torch.float32), tmp_path / "out", ids=IDS, recipe=recipe)
    assert {chosen.form for chosen in result.plan.forms.values()} == {"pair"}
    assert not [name for name in FORMS if FORMS[name].nested and name != "pair"]


def test_modules_of_every_form(tmp_path: Path) -> None:
    model = lively("llama", torch.float32)
    run(model, tmp_path / "out", ids=IDS, recipe=recipe_of(ranks=explicit(model, "mixed")))
    loaded: Any = load_model(tmp_path / "out")
    first, second = loaded.model.layers[0].mlp, loaded.model.layers[1].mlp
    assert type(first.down_proj) is type(first.gate_proj) is nn.Linear
    assert (first.gate_proj.out_features, first.down_proj.in_features) == (WIDTH, WIDTH)
    assert {type(second.down_proj).__name__, type(second.gate_proj).__name__} <= {"PackedLinear", "LowRankLinear"}
    assert torch.equal(second.down_proj.order, torch.arange(48, dtype=torch.int32))  # gate and up are in its order
