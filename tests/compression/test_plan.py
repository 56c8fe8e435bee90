"""Plans: their parts, their flat form, and what evidence changes in them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import svdllm
from families import tiny_model
from gguf_local import write_gguf
from runs import ranks_in, run, small_recipe, token_windows
from svdllm import InputError, UnsupportedModelError
from svdllm.compression.plan import make_plan, refine
from svdllm.compression.ranks import Evidence
from svdllm.compression.subject import Subject, discover_subject
from svdllm.models.open import open_config

# What readers of `svdllm plan --json` have found since version 0.1.
KEYS_OF_0_1 = {
    "model",
    "model_type",
    "dtype",
    "device",
    "compute_dtype",
    "method",
    "allocation",
    "ranks_known",
    "predicted_loss",
    "allocation_gap",
    "allocation_threshold",
    "target_speedup",
    "speed",
    "linear_times",
    "num_blocks",
    "num_groups",
    "targets",
    "ignored",
    "achieved_ratio",
    "params",
    "dense_params",
    "file_bytes",
    "dense_file_bytes",
    "factor_bits",
    "quantized_file_bytes",
    "elastic_bytes",
    "ram_by_stage",
    "hidden_states_bytes",
    "hidden_states_on_disk",
    "device_bytes",
    "disk_bytes",
    "seconds_by_stage",
    "quantized_source",
    "unused_tensors",
    "warnings",
    "peak_ram_bytes",
    "seconds",
}


def subject_of(recipe: svdllm.Recipe) -> Subject:
    return discover_subject(open_config(tiny_model("llama")), recipe)


def falling_energies(subject: Subject) -> dict[str, torch.Tensor]:
    """Spectra of which those of later targets fall faster."""
    return {
        target.name: torch.arange(1.0, target.full_rank + 1, dtype=torch.float64) ** -(1 + 0.2 * number)
        for number, target in enumerate(subject.structure.targets)
    }


def test_a_plan_is_one_flat_document() -> None:
    (plan,) = svdllm.plan(tiny_model("llama"), small_recipe(ratio=0.3))
    document = json.loads(json.dumps(plan.to_dict()))
    assert set(document) >= KEYS_OF_0_1
    assert document["ratio"] == 0.3 <= document["achieved_ratio"] == plan.sizes.achieved_ratio
    assert document["params"] == plan.params == plan.sizes.params
    assert document["peak_ram_bytes"] == max(document["ram_by_stage"].values())
    assert document["seconds"] == pytest.approx(sum(document["seconds_by_stage"].values()))
    assert {target["name"]: target["rank"] for target in document["targets"]} == ranks_in(plan.forms)


def test_another_budget_than_a_ratio_has_none_to_ask_for() -> None:
    (plan,) = svdllm.plan(tiny_model("llama"), small_recipe(target_params=15_000))
    assert plan.to_dict()["ratio"] is None
    assert 0 < plan.to_dict()["achieved_ratio"] < 1


def test_evidence_changes_ranks_and_sizes_and_no_needs() -> None:
    recipe = small_recipe(ratio=0.3, allocation="effective-rank")
    subject = subject_of(recipe)
    plan = make_plan(subject, recipe)
    assert not plan.forms_known
    marked = replace(plan, needs=replace(plan.needs, disk_bytes=12345))
    refined = refine(marked, subject, Evidence(falling_energies(subject)))
    assert refined.forms_known
    assert refined.forms != plan.forms
    assert refined.needs == marked.needs
    assert (refined.recipe, refined.structure, refined.warnings) == (plan.recipe, plan.structure, plan.warnings)
    kept = sum(target.params for target in refined.targets)
    assert refined.achieved_ratio == pytest.approx(1 - kept / subject.structure.num_target_params)


def test_shapes_are_enough_for_uniform_ranks() -> None:
    recipe = small_recipe(ratio=0.3)
    plan = make_plan(subject_of(recipe), recipe)
    assert plan.forms_known
    assert plan.speed is None


def test_a_gguf_file_is_read_once_for_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from svdllm.models import gguf

    opened: list[Path] = []

    class Counted(gguf.GgufFile):
        def __init__(self, path: Path):
            opened.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GgufFile", Counted)
    path = write_gguf(tmp_path / "tiny.gguf")
    recipe = svdllm.Recipe(ratio=0.3, samples=4, gradient_samples=2, device="cpu")  # leaves seqlen to the model
    result = run(path, tmp_path / "out", recipe=recipe, ids=token_windows(4, 64, vocab=256))
    assert opened == [path]
    assert result.load().num_parameters() == result.plan.params


def test_the_report_says_the_ratio_asked_for_and_the_one_reached(tmp_path: Path) -> None:
    result = run(tiny_model("llama"), tmp_path / "out", recipe=small_recipe(ratio=0.3, round_to=4))
    report = json.loads((tmp_path / "out" / "svdllm" / "report.json").read_text())
    assert report["ratio"] == 0.3 < report["achieved_ratio"] == result.plan.achieved_ratio
    assert f"| {report['achieved_ratio']:.2%} |" in (tmp_path / "out" / "README.md").read_text()


def test_a_config_alone_can_be_planned_and_not_compressed(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "whole")
    model.config.save_pretrained(tmp_path / "config")
    (of_config,), (of_whole,) = (svdllm.plan(tmp_path / name, small_recipe()) for name in ("config", "whole"))
    assert of_config.warnings == [*of_whole.warnings, "config holds no weights: the plan is of its config alone."]
    assert (of_config.forms, of_config.params, of_config.file_bytes) == (
        of_whole.forms,
        of_whole.params,
        of_whole.file_bytes,
    )
    with pytest.raises(InputError, match=r"config has a config\.json but no model\.safetensors"):
        run(tmp_path / "config", tmp_path / "out")
    (tmp_path / "config" / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(UnsupportedModelError, match=r"no safetensors weights, only pytorch_model\.bin"):
        svdllm.plan(tmp_path / "config", small_recipe())
