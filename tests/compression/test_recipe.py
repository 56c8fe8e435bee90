"""Recipes: what is refused, with which words, and that they survive being written down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from svdllm.common.errors import InputError
from svdllm.compression.recipe import Recipe
from svdllm.compression.recipe_files import load_settings, make_recipe, preset_settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratoi": 0.2}, "ratoi: Extra inputs are not permitted"),
        ({"ratio": 0.2, "target_params": 100}, "ratio and target_params are given together; give exactly one budget"),
        ({"target_size": 5, "ranks": {"q": 3}}, "target_size and ranks are given together"),
        ({"ratio": 0.0}, r"ratio: Input should be greater than 0 \(found 0.0\)"),
        ({"ratio": 1.0}, r"ratio: Input should be less than 1 \(found 1.0\)"),
        ({"ratio": 20}, r"ratio: Input should be less than 1 \(found 20\)"),
        ({"ratio": float("nan")}, "ratio: Input should be"),
        ({"ratio": [0.2, 1.5]}, r"less than 1 \(found 1.5\)"),
        ({"ratio": []}, "ratio is an empty list; give at least one"),
        ({"ratio": [0.2, 0.4, 0.2]}, r"ratio names a value twice: \(0.2, 0.4, 0.2\)"),
        ({"strs_ratios": [0.5, 0.2, 0.5]}, r"strs_ratios: names a value twice: \(0.5, 0.2, 0.5\)"),
        ({"strs_ratios": []}, "strs_ratios: Tuple should have at least 1 item"),
        ({"strs_ratios": [0.5, 1.0]}, r"less than 1 \(found 1.0\)"),
        ({"probe_share": 1.0}, r"probe_share: Input should be less than 1 \(found 1.0\)"),
        ({"target_params": 0}, "target_params: Input should be greater than 0"),
        ({"method": "svdllm"}, r"method: unknown method 'svdllm'; known are svd-llm, svd, asvd, fwsvd"),
        ({"ignore": ["(q_proj"]}, r"ignore: '\(q_proj' is not a regular expression: missing \)"),
        ({"overrides": {"[": 0.5}}, r"overrides: '\[' is not a regular expression"),
        ({"ranks": {"*": 5}}, r"ranks: '\*' is not a regular expression: nothing to repeat"),
        ({"overrides": {"q": 1.0}}, "overrides.q: Input should be less than 1"),
        ({"overrides": {"q": -0.1}}, "overrides.q: Input should be greater than or equal to 0"),
        ({"ranks": {"q": 5}, "overrides": {"k": 0.2}}, "overrides and round_to do nothing to explicit ranks"),
        ({"ranks": {"q": 5}, "round_to": 8}, "overrides and round_to do nothing to explicit ranks"),
        ({"round_to": 0}, "round_to: Input should be greater than or equal to 1"),
        ({"asvd_alpha": 1.5}, "asvd_alpha: Input should be less than or equal to 1"),
        ({"seqlen": 1}, "seqlen: Input should be greater than or equal to 2"),
        ({"samples": 0}, "samples: Input should be greater than or equal to 1"),
        ({"dtype": "int8"}, "dtype: Input should be 'auto'"),
        ({"metric": "one-sided"}, "metric: unknown metric 'one-sided'; known are input, two-sided"),
        (
            {"allocation": "best"},
            "allocation: unknown allocation 'best'; known are uniform, v2, effective-rank, loss, strs",
        ),
    ],
)
def test_what_is_wrong_is_told(settings: dict[str, Any], message: str):
    with pytest.raises(InputError, match=f"^here: .*{message}"):
        make_recipe(settings, "here")


def test_every_problem_is_told_at_once():
    with pytest.raises(InputError, match=r"the settings: seqlen: .*; seed: .*") as caught:
        make_recipe({"seqlen": 0, "seed": -1})
    assert str(caught.value).count(";") == 1


def test_a_recipe_is_frozen_and_keyword_only():
    recipe = Recipe(ratio=0.2)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.ratio = 0.3  # type: ignore[misc]
    with pytest.raises(TypeError):
        Recipe("svd")  # type: ignore[misc, call-arg]


def test_a_budget_is_needed_to_compress():
    with pytest.raises(InputError, match="No budget: give exactly one of --ratio"):
        Recipe().require_budget()
    for budget in ({"ratio": 0.2}, {"target_params": 5}, {"target_size": 5}, {"ranks": {"q": 5}}):
        Recipe(**budget).require_budget()


def test_several_ratios_make_one_recipe_each():
    recipe = Recipe(ratio=(0.2, 0.4), samples=7)
    assert [(single.ratio, single.samples) for single in recipe.single()] == [(0.2, 7), (0.4, 7)]
    assert Recipe(ratio=0.2).single() == [Recipe(ratio=0.2)]


def test_the_preset_paper_is_the_papers_settings():
    """Section 4: whitening, one ratio for all, 256 windows of 2048 tokens of WikiText-2's training part, seed 3."""
    settings = preset_settings("paper")
    assert settings == {
        "method": "svd-llm",
        "metric": "input",
        "shrinkage": 0.0,
        "calibration_mode": "dense",
        "allocation": "uniform",
        "round_to": 1,
        "calibration": "wikitext2",
        "samples": 256,
        "seed": 3,
    }
    recipe = make_recipe({**settings, "ratio": 0.2})
    assert recipe.seqlen == 2048
    assert recipe.calibration_mode == "dense"
    assert not recipe.bias_correction
    with pytest.raises(InputError, match="Unknown preset 'papers'; known are paper, balanced, best"):
        preset_settings("papers")


@pytest.mark.parametrize(("context", "seqlen"), [(128, 128), (2048, 2048), (4096, 2048), (None, 2048)])
def test_a_seqlen_that_nobody_asked_for_keeps_to_the_context(context: int | None, seqlen: int):
    assert make_recipe(preset_settings("paper")).within(context).seqlen == seqlen
    asked = Recipe(seqlen=2048)
    assert asked.within(context) is asked


def test_the_defaults_are_the_preset_balanced():
    assert make_recipe(preset_settings("balanced")) == Recipe()


@pytest.mark.parametrize(
    "settings", [{"method": "svd"}, {"method": "asvd"}, {"method": "fwsvd"}, {"ranks": {"q_proj": 4}}]
)
def test_what_has_no_use_for_gradients_or_probes_is_plain_by_default(settings: dict[str, Any]):
    recipe = Recipe(**settings)
    assert recipe.allocation == "uniform"
    assert recipe.round_to == 1
    if "method" in settings:
        assert (recipe.metric, recipe.shrinkage) == ("input", 0.0)


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"method": "svd"}, False),
        ({"method": "svd", "allocation": "effective-rank"}, False),
        ({"method": "svd", "allocation": "loss"}, True),
        ({"method": "svd", "allocation": "strs"}, True),
        ({"method": "asvd"}, True),
        ({"method": "fwsvd"}, True),
    ],
)
def test_text_is_needed_by_the_method_or_for_probes(settings: dict[str, Any], needed: bool):
    assert Recipe(**settings).needs_tokens == needed


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "svd", "metric": "two-sided"}, "method svd has no Gram"),
        ({"method": "asvd", "shrinkage": 0.1}, "shrinkage acts on a Gram"),
        ({"method": "svd", "bias_correction": True}, "needs the mean inputs"),
        ({"method": "asvd", "calibration_mode": "sequential"}, "Grams of the compressed stream"),
        ({"calibration_mode": "sequential", "elastic": True, "ratio": 0.2}, "fits the factors of every size anew"),
        ({"ranks": {"q": 4}, "allocation": "loss"}, "ranks are given"),
        ({"ranks": {"q": 4}, "allocation": "strs"}, "ranks are given"),
        ({"target_params": 100, "allocation": "v2"}, "v2 cannot keep to target_params; give a ratio, or use another"),
        ({"target_speedup": 1.2, "allocation": "strs"}, "which allocation strs does not count; use allocation loss"),
        ({"gradient_shrinkage": 0.0}, "greater than 0"),
        ({"ratio": 0.2, "elastic": True, "bias_correction": True}, "belong to one rank"),
    ],
)
def test_combinations_that_make_no_sense_are_refused_with_a_reason(settings: dict[str, Any], reason: str):
    with pytest.raises(InputError, match=reason):
        make_recipe(settings)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(ratio=0.2, ignore=("lm_head", r"layers\.\d+\.mlp"), overrides={"v_proj": 0.0, "q|k": 0.5}, round_to=8),
        Recipe(ratio=(0.2, 0.4), method="asvd", asvd_alpha=0.25),
        Recipe(ranks={"q_proj": 5, "k": "full"}, dtype="bfloat16", calibration="a.txt"),
        Recipe(target_size=123_456_789_012),
    ],
)
def test_yaml_round_trip(recipe: Recipe, tmp_path: Path):
    assert make_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    assert make_recipe(recipe.to_dict()) == recipe
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert make_recipe(load_settings(tmp_path / "recipe.yaml")) == recipe
    assert list(recipe.to_dict()) == list(Recipe.model_fields)


def test_a_recipe_file_that_is_none(tmp_path: Path):
    with pytest.raises(InputError, match=r"Recipe .*absent\.yaml cannot be read: .*No such file"):
        load_settings(tmp_path / "absent.yaml")
    for content, message in (
        (b"- 1\n- 2\n", "expected a mapping of settings, found list"),
        (b"", "expected a mapping of settings, found NoneType"),
        (b"a: [", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
    ):
        (tmp_path / "bad.yaml").write_bytes(content)
        with pytest.raises(InputError, match=message):
            load_settings(tmp_path / "bad.yaml")
