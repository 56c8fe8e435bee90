"""Runs that store weights in few bits, end to end on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import svdllm
from quantized_sources import CASES, write_models
from runs import TEXT as TEXT_OF_WORDS
from runs import save_dense, token_windows
from svdllm import InputError, Recipe, UnsupportedModelError, compress
from svdllm.checkpoint.report import read_report
from svdllm.checkpoint.weight_sizes import weight_bytes
from svdllm.compression.recipe_files import make_recipe
from svdllm.export.quantize_calibrated import quantize_calibrated

pytest.importorskip("compressed_tensors")

WIDTHS = {"hidden_size": 64, "intermediate_size": 96}
TEXT = {"samples": 8, "seqlen": 32, "gradient_samples": 2}
INTEGERS = ("int8", "int5", "int4", "int3", "int2")


def _compressed(folder: Path, family: str = "llama", overrides: dict[str, Any] | None = None, **settings: Any) -> Any:
    save_dense(folder / "dense", family, **WIDTHS, **(overrides or {}))
    return compress(folder / "dense", Recipe(**TEXT, **settings), folder / "out", calibration=_ids())


def _ids():
    return token_windows(8, 32, vocab=300)


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(_ids()[:2]).logits


@pytest.mark.parametrize("mode", ["dense", "sequential"])
def test_a_size_is_kept_and_the_files_are_as_predicted(tmp_path: Path, mode: str):
    result = _compressed(tmp_path, target_size=60_000, forms=INTEGERS, calibration_mode=mode)
    files = weight_bytes(result.output_dir)
    assert files.files == result.plan.file_bytes <= 60_000
    assert result.plan.allocation.gap == 0
    parts = result.plan.sizes.bytes_by_part
    assert sum(parts.values()) == files.files
    report = read_report(result.output_dir)
    assert report["params"] == report["dense_params"]
    assert report["vocabulary"]
    names = [name for name, _ in svdllm.verify(result.output_dir)]
    assert names[-1] == "logits"
    dense = _logits(svdllm.load_model(tmp_path / "dense", dtype=torch.float32))
    assert (
        _logits(svdllm.load_model(result.output_dir, dtype=torch.float32)) - dense
    ).abs().max() < 0.2 * dense.abs().max()


def _native(folder: Path, **options: Any) -> Any:
    """The model as transformers loads it, its weights unpacked by compressed-tensors."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def _assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within what weights in bfloat16 differ from those in float32."""
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_tied_embedding_stays_tied_and_is_saved_as_it_was(tmp_path: Path):
    ranks = {"embed_tokens": {"int4": 32}, "up_proj": {"int4": 32}}
    result = _compressed(tmp_path, ranks=ranks, calibration_mode="dense")
    model = _native(result.output_dir)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    logits = _logits(model)
    model.save_pretrained(tmp_path / "again")
    assert weight_bytes(tmp_path / "again").files < 1.5 * weight_bytes(result.output_dir).files
    assert torch.equal(_logits(_native(tmp_path / "again")), logits)
    _assert_close(_logits(_native(result.output_dir, trust_remote_code=True)), logits)
    _assert_close(_logits(svdllm.load_model(result.output_dir, dtype=torch.float32)), logits)


def test_without_low_rank_the_folder_is_one_of_the_family(tmp_path: Path):
    ranks = {"layers": {"int4": 32}}
    result = _compressed(tmp_path, ranks=ranks, calibration_mode="dense")
    config = json.loads((result.output_dir / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert "svdllm" not in config
    assert not list(result.output_dir.glob("*.py"))
    svdllm.verify(result.output_dir)
    _assert_close(
        _logits(svdllm.load_model(result.output_dir, dtype=torch.float32)), _logits(_native(result.output_dir))
    )


def test_factors_in_8_bits_compute_what_they_did(tmp_path: Path):
    forms = {"q_proj": ("pair", 16), "o_proj": ("packed", 24), "down_proj": ("packed", 16)}
    logits = {}
    for bits in ("", "-int8"):
        ranks = {name: {f"{form}{bits}": size} for name, (form, size) in forms.items()}
        result = _compressed(tmp_path / f"x{bits}", "qwen2", ranks=ranks, calibration_mode="dense")
        svdllm.verify(result.output_dir)
        logits[bits] = _logits(svdllm.load_model(result.output_dir, dtype=torch.float32))
    assert not torch.equal(logits[""], logits["-int8"])
    assert (logits[""] - logits["-int8"]).abs().max() < 0.03 * logits[""].abs().max()


def test_a_size_below_the_smallest_forms_is_refused_with_them(tmp_path: Path):
    with pytest.raises(InputError, match=r"cannot be met.*int2"):
        _compressed(tmp_path, target_size=20_000, forms=INTEGERS)


def test_a_group_that_does_not_divide_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"asks for int4 128 of .*, which can have 32, 64"):
        _compressed(tmp_path, ranks={"up_proj": {"int4": 128}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"forms": ("int4",), "ratio": 0.3}, "give target_size as the budget"),
        ({"forms": ("int4",), "target_size": 10**6, "method": "svd", "allocation": "loss"}, "method svd has none"),
        ({"forms": ("pair",), "target_size": 10**6, "runtime": "llama.cpp"}, "llama.cpp cannot load it"),
        ({"runtime": "word", "target_size": 10**6}, "unknown runtime"),
        ({"runtime": "llama.cpp", "ratio": 0.3}, "give target_size as the budget"),
        ({"forms": ("int4",), "target_size": 10**6, "overrides": {"up_proj": 0.5}}, "an override gives a rank"),
        ({"forms": ("int4",), "target_size": 10**6, "factor_bits": 8}, "svdllm quantize"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        make_recipe(settings)


def test_an_embedding_in_few_bits_is_not_compressed_again(tmp_path: Path):
    result = _compressed(tmp_path, ranks={"embed_tokens": {"int8": 32}}, calibration_mode="dense")
    svdllm.verify(result.output_dir)
    with pytest.raises((InputError, UnsupportedModelError), match=r"is quantised|compressed already"):
        compress(result.output_dir, Recipe(ratio=0.2, **TEXT), tmp_path / "twice", calibration=_ids())


@pytest.mark.parametrize("mode", ["dense", "sequential"])
def test_corrections_are_chosen_stored_and_lose_less_than_bits_alone(tmp_path: Path, mode: str):
    losses = {}
    for form, given in (("int2", {"int2": 32}), ("int2-corrected", {"int2-corrected": 6})):
        ranks = {"up_proj|down_proj|o_proj": given}
        result = _compressed(tmp_path / form, ranks=ranks, calibration_mode=mode)
        svdllm.verify(result.output_dir)
        losses[form] = sum(linear.loss**2 for linear in result.linears)
        dense = _logits(svdllm.load_model(tmp_path / form / "dense", dtype=torch.float32))
        difference = (_logits(svdllm.load_model(result.output_dir, dtype=torch.float32)) - dense).square().mean()
        losses[form, "logits"] = float(difference)
    assert losses["int2-corrected"] < losses["int2"]
    assert losses["int2-corrected", "logits"] < losses["int2", "logits"]
    parts = result.plan.sizes.bytes_by_part
    assert parts["corrections"] > 0
    assert sum(parts.values()) == weight_bytes(result.output_dir).files


@pytest.mark.parametrize(
    ("settings", "runtime"),
    [
        ({}, "transformers"),
        ({"runtime": None}, None),
        ({"runtime": "llama.cpp"}, "llama.cpp"),
        ({"forms": ("pair", "packed")}, None),
        ({"factor_bits": 8}, None),
        ({"allocation": "uniform"}, None),
        ({"method": "svd"}, None),
        ({"target_size": None, "ratio": 0.2}, None),
        ({"target_size": None, "target_params": 10**6}, None),
    ],
)
def test_a_size_is_spent_on_all_that_transformers_loads(settings: dict[str, Any], runtime: str | None):
    recipe = make_recipe({"target_size": 10**6} | settings)
    assert recipe.runtime == runtime
    assert ("int4" in recipe.used_forms) == (runtime is not None)
    assert make_recipe(recipe.to_dict()) == recipe


def test_a_missing_package_is_named_with_the_other_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("svdllm.common.extras.importlib.util.find_spec", lambda name: None)
    message = r"'compressed_tensors': pip install 'svdllm\[quantize\]', or .* --forms pair,packed,narrow"
    with pytest.raises(InputError, match=message):
        _compressed(tmp_path, target_size=60_000)
    assert not (tmp_path / "out").exists()


def test_rounded_weights_are_not_rounded_again(tmp_path: Path):
    quantized, dense = write_models(CASES["gptq 4"], tmp_path)
    asked = Recipe(target_size=10**6, **TEXT)
    with pytest.raises(InputError, match=r"quantised already \(GPTQ \(4 bits\)\).*made of, in 16 or .*--forms pair"):
        svdllm.plan(quantized, asked)
    (quantized / "README.md").write_text("---\nbase_model:\n- some/original\n---\n")
    with pytest.raises(InputError, match=r"made of \(some/original\), in 16"):
        compress(quantized, asked, tmp_path / "out", calibration=_ids())
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="nothing to compress"):  # the size is the dense model's
        svdllm.plan(dense, asked)
    size = svdllm.plan(quantized, Recipe(ratio=0.2, **TEXT))[0].file_bytes
    svdllm.plan(quantized, Recipe(target_size=size, forms=("pair", "packed"), **TEXT))


def test_the_original_of_a_folder_of_ours_is_named(tmp_path: Path):
    ranks = {r"layers": {"int4": 32}}
    folder = _compressed(tmp_path, ranks=ranks, calibration_mode="dense").output_dir
    with pytest.raises(InputError, match=r"quantised already \(compressed-tensors .*made of \(.*dense\)"):
        svdllm.plan(folder, Recipe(target_size=10**6, **TEXT))


def test_what_vllm_joins_has_one_form(tmp_path: Path):
    result = _compressed(tmp_path, target_size=135_000, runtime="vllm")
    forms = result.plan.forms
    assert {chosen.form for chosen in forms.values()} == {"int8", "int4"}
    for block in (0, 1):
        for joined in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({forms.get(f"model.layers.{block}.{name}") for name in joined}) == 1
    assert all("layers" in name for name in forms)
    assert weight_bytes(result.output_dir).files == result.plan.file_bytes <= 135_000
    assert result.plan.allocation.gap == 0
    svdllm.verify(result.output_dir)


def test_every_form_that_transformers_loads_is_considered(tmp_path: Path):
    result = _compressed(tmp_path, target_size=90_000, runtime="transformers", round_to=8)
    assert {"pair", "packed-int8", "int3", "int4-corrected"} <= set(result.recipe.used_forms)
    assert weight_bytes(result.output_dir).files <= 90_000
    svdllm.verify(result.output_dir)


def test_quantize_with_a_text_gives_all_linears_one_form(tmp_path: Path, tokenizer: Any):
    save_dense(tmp_path / "dense", tokenizer=tokenizer, **WIDTHS)
    (tmp_path / "text.txt").write_text(TEXT_OF_WORDS)
    options = {"skip": ["o_proj"], "calibration": str(tmp_path / "text.txt"), "samples": 4, "seqlen": 16}
    result = quantize_calibrated(tmp_path / "dense", tmp_path / "out", bits=4, group_size=32, **options)
    assert {chosen.form for chosen in result.plan.forms.values()} == {"int4"}
    assert len(result.plan.forms) == 12
    assert not any("o_proj" in name for name in result.plan.forms)
    svdllm.verify(result.output_dir)
    with pytest.raises(InputError, match="expected one of 8, 6, 5, 4, 3, 2"):
        quantize_calibrated(tmp_path / "dense", tmp_path / "other", bits=7, **options)


def test_what_has_no_form_in_few_bits_is_named(tmp_path: Path):
    asked = Recipe(target_size=10**5, **TEXT)
    for family, said in (("gpt2", "8 of 8 linears, such as transformer.h.0"), ("llama", None)):
        dense = save_dense(tmp_path / family, family, **(WIDTHS if family == "llama" else {}))
        (plan,) = svdllm.plan(dense, asked)
        found = [warning for warning in plan.warnings if "few bits" in warning]
        assert len(found) == (said is not None)
        assert said is None or said in found[0]
