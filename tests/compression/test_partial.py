"""Models of which a part can be compressed: whole runs, what is refused, and what the plan and the report list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from families import tiny_model, tiny_tokens
from runs import run, small_recipe
from svdllm import UnsupportedModelError, plan, verify
from svdllm.checkpoint.report import read_report


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mamba2", "granitemoehybrid", "gemma3n_text", "bart"])
def test_at_full_rank_the_model_is_the_dense_one(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "dense")
    recipe = small_recipe(ranks={".": "full"}, allow_partial=True)
    result = run(tmp_path / "dense", tmp_path / "out", recipe=recipe)
    made: Any = result.load(dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(input_ids=tiny_tokens(), use_cache=False).logits
        found = made(input_ids=tiny_tokens(), use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert made.num_parameters() == result.plan.params
    verify(tmp_path / "out", "cpu")
    assert read_report(tmp_path / "out")["dense_parts"] == result.plan.to_dict()["dense_parts"]


@pytest.mark.parametrize("family", ["qwen3_moe", "mamba2", "rwkv"])
def test_the_preset_with_gradients_runs(family: str, tmp_path: Path) -> None:
    recipe = small_recipe(metric="two-sided", allocation="loss", allow_partial=True, round_to=1)
    result = run(tiny_model(family), tmp_path / "out", recipe=recipe)
    assert result.plan.params < result.plan.dense_params
    verify(tmp_path / "out", "cpu")


def test_less_than_half_of_the_blocks_is_refused_unless_allowed() -> None:
    model = tiny_model("dbrx")  # its experts are stacked in a way of their own
    with pytest.raises(UnsupportedModelError, match=r"Only \d+\.\d% of the [\d,]+ parameters .* Pass --allow-partial"):
        plan(model, small_recipe())
    (made,) = plan(model, small_recipe(allow_partial=True))
    assert made.recipe.to_dict()["allow_partial"] is True
    assert made.to_dict()["dense_parts"][0]["share"] > 0.5
    # What the user leaves out is no reason to refuse.
    plan(tiny_model("llama"), small_recipe(ignore=("mlp",)))


def test_linears_too_small_to_gain_stay_dense() -> None:
    # The gate of the shared expert has one output.
    (made,) = plan(tiny_model("qwen2_moe"), small_recipe(allow_partial=True, ratio=0.6))
    small = [module for module in made.structure.dense if module.reason == "too small to gain"]
    assert [module.name for module in small] == [f"model.layers.{n}.mlp.shared_expert_gate" for n in range(2)]
    assert {module.params for module in small} == {32}
