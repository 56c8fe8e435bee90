"""Predicted sizes of quantised models: files are never larger, and of real models at most 0.5 % smaller."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import svdllm
from families import tiny_model
from runs import pairs, ranks_in, run, save_dense, small_recipe
from svdllm.checkpoint.quantized import ENTRY_BYTES, NOTE_BYTES
from svdllm.checkpoint.report import read_report
from svdllm.checkpoint.tensors import (
    SHARD_BYTES,
    Tensors,
    empty_files_bytes,
    file_bytes,
    shard_names,
    share_of_files,
)
from svdllm.checkpoint.weight_sizes import weight_bytes
from svdllm.cli import main
from svdllm.common.errors import InputError
from svdllm.comparison.variants import variants_of
from svdllm.compression.forms import FORMS
from svdllm.compression.ranks.predicted_sizes import EMPTY_QUANTIZED_BYTES, QuantizedFiles
from svdllm.compression.recipe_files import load_settings, make_recipe
from svdllm.compression.subject import structure_for
from svdllm.export.quantize import quantize
from svdllm.models.chosen import Chosen, Forms
from svdllm.models.open import open_config
from svdllm.models.skeleton import build_skeleton
from svdllm.models.structure import Target

WIDE: dict[str, Any] = {"hidden_size": 160, "intermediate_size": 240}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": WIDE,  # tied embeddings
    "mistral": WIDE,
    "qwen2": WIDE,  # biases
    "gpt2": {"n_embd": 160},  # a Conv1D that stays dense is left as it is
    "phi3": WIDE,
    "opt": {"hidden_size": 160, "ffn_dim": 240, "word_embed_proj_dim": 160},
    "gemma3_text": {**WIDE, "head_dim": 10},  # queries and keys that are not in sixteens
}


def files_of(folder: Path, bits: int, **settings: Any) -> QuantizedFiles:
    source = open_config(folder)
    skeleton = build_skeleton(source.config)
    structure = structure_for(skeleton, small_recipe(**settings))
    return QuantizedFiles.of(skeleton, structure.targets, source.dtype, bits)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def budget_of(files: QuantizedFiles, least: int) -> int:
    """Half-way between the dense model and the least ranks, once quantised."""
    return (files.num_bytes({}) + files.num_bytes(pairs({target.name: least for target in files.targets}))) // 2


def check(dense: Path, work: Path, bits: int, **settings: Any) -> None:
    """Compresses and quantises: files within the prediction, which is within the budget; no rank could be higher."""
    settings = {"round_to": 16 if bits == 4 else 1} | settings
    files = files_of(dense, bits, **settings)
    budget = budget_of(files, settings["round_to"])
    recipe = small_recipe(**settings, target_size=budget, factor_bits=bits)
    result = run(dense, work / "small", recipe=recipe)
    forms = result.plan.forms
    quantize(work / "small", work / "few", bits=bits, format="torchao")
    predicted = result.plan.sizes.quantized_file_bytes
    assert predicted is not None
    assert predicted <= budget
    assert_close_from_above(predicted, files, forms, work / "few")
    assert result.plan.file_bytes == size(work / "small")
    if recipe.allocation == "strs":
        return  # which takes the ranks of one threshold and no more
    targets = {target.name: target for target in files.targets}
    for name, chosen in forms.items():
        raised = replace(chosen, size=chosen.size + recipe.round_to)
        may_rise = raised.size in FORMS[chosen.form].sizes(targets[name], recipe.round_to)
        if may_rise and not any(re.search(fixed, name) for fixed in recipe.overrides):
            assert files.num_bytes({**forms, **dict.fromkeys(together(targets[name], files, chosen), raised)}) > budget


def together(target: Target, files: QuantizedFiles, chosen: Chosen) -> list[str]:
    """Names of the targets that have the same size in any case: those of an MLP that is narrowed."""
    if not FORMS[chosen.form].of_mlps or target.inner is None:
        return [target.name]
    return [other.name for other in files.targets if other.inner is not None and other.inner.mlp == target.inner.mlp]


def assert_close_from_above(predicted: int, files: QuantizedFiles, forms: Forms, folder: Path) -> None:
    """The bytes of weights are exact; of headers there may be less, by the margin of a few hundred bytes a tensor."""
    found = weight_bytes(folder)
    assert found.files == size(folder) <= predicted
    margin = predicted - found.files
    tensors = files.tensors(forms)
    count = len(list(folder.glob("*.safetensors")))
    assert margin < (count + 1) * (EMPTY_QUANTIZED_BYTES + (ENTRY_BYTES + NOTE_BYTES) * len(tensors))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_quantised_files_have_the_size_that_was_asked_for(family: str, bits: int, tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense", family, **FAMILIES[family])
    check(dense, tmp_path, bits)


@pytest.mark.parametrize(
    ("bits", "settings"),
    [
        (8, {"round_to": 8, "ignore": (r"0\.mlp", "k_proj")}),
        (8, {"overrides": {"q_proj": 0.5, "down_proj": 0.0}}),
        (4, {"overrides": {"q_proj": 0.6}, "ignore": ("o_proj",)}),
        (4, {"round_to": 32}),
        (8, {"bias_correction": True}),
        (8, {"allocation": "loss", "round_to": 4}),
        (4, {"allocation": "loss", "metric": "two-sided"}),
        (8, {"allocation": "effective-rank", "overrides": {"up_proj": 0.4}}),
        (4, {"allocation": "effective-rank"}),
        (8, {"allocation": "strs", "ignore": ("v_proj",)}),
        (4, {"allocation": "strs"}),
        (8, {"method": "svd"}),
        (8, {"joint_kv": True}),
        (4, {"joint_kv": True, "allocation": "loss"}),
    ],
    ids=str,
)
def test_with_every_way_to_choose_ranks(bits: int, settings: dict[str, Any], tmp_path: Path) -> None:
    check(save_dense(tmp_path / "dense", "llama", **WIDE), tmp_path, bits, **settings)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_second_factor_of_rank_one_is_left_as_it_is(bits: int, tmp_path: Path) -> None:
    """torchao has no form of a linear of one input."""
    dense = save_dense(tmp_path / "dense", "llama", **WIDE)
    run(dense, tmp_path / "small", recipe=small_recipe(ranks={"q_proj": 1}))
    result = quantize(tmp_path / "small", tmp_path / "few", bits=bits, format="torchao")
    name = "model.layers.0.self_attn.q_proj.svd_u"
    assert result.left[name] == "a linear of one input, of which torchao has no form"
    files = files_of(dense, bits)
    forms = pairs({t.name: 1 for t in files.targets if t.name.endswith("q_proj")})
    assert_close_from_above(files.num_bytes(forms), files, forms, tmp_path / "few")
    assert svdllm.verify(tmp_path / "few")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_not_quantised_has_the_dtype_of_most(dtype: torch.dtype, tmp_path: Path) -> None:
    """Norms that the source has in float32 are written so, and quantising gives them the dtype of the model."""
    model = tiny_model("llama", vocab_size=300, **WIDE).to(dtype)
    model.model.norm.float()
    model.save_pretrained(tmp_path / "dense")
    check(tmp_path / "dense", tmp_path, 8)


@pytest.mark.parametrize("bits", [8, 4])
def test_several_files(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = save_dense(tmp_path / "dense", "llama", **WIDE)
    ranks = {target.name: 16 for target in files_of(dense, bits).targets[::2]}
    run(dense, tmp_path / "small", recipe=small_recipe(ranks={f"^{name}$": rank for name, rank in ranks.items()}))
    monkeypatch.setattr(sys.modules["svdllm.export.quantize_torchao"], "SHARD_BYTES", 60_000)
    quantize(tmp_path / "small", tmp_path / "few", bits=bits, format="torchao")
    assert len(list((tmp_path / "few").glob("*.safetensors"))) > 2
    assert files_of(dense, bits).num_bytes(pairs(ranks)) < size(tmp_path / "few")  # which counts on one file
    monkeypatch.setattr("svdllm.checkpoint.tensors.SHARD_BYTES", 60_000)
    assert files_of(dense, bits).num_bytes(pairs(ranks)) >= size(tmp_path / "few")


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_counted_to_the_byte(bits: int, tmp_path: Path) -> None:
    """What a prediction says beside the margin for headers is what files hold beside their headers."""
    dense = save_dense(tmp_path / "dense", "qwen2", **WIDE)
    files = files_of(dense, bits)
    quantize(dense, tmp_path / "few", bits=bits, format="torchao")
    found = weight_bytes(tmp_path / "few")
    headers = sum(ENTRY_BYTES + NOTE_BYTES + 5 * len(name) for name in files.dense) + EMPTY_QUANTIZED_BYTES
    assert files.num_bytes({}) - headers == found.quantized + found.other
    assert 0.35 * headers < found.headers < headers


@pytest.mark.parametrize("bits", [8, 4])
def test_of_a_model_of_real_size_the_margin_is_below_half_a_percent(bits: int) -> None:
    """The shapes of SmolLM2-135M. Only the limit on headers is not exact, and files hold more than 0.35 of it."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    skeleton = build_skeleton(config)
    structure = structure_for(skeleton, small_recipe())
    files = QuantizedFiles.of(skeleton, structure.targets, torch.bfloat16, bits)
    forms = pairs({target.name: target.break_even_rank // 32 * 16 for target in structure.targets})
    headers = sum(ENTRY_BYTES + NOTE_BYTES + 5 * len(name) for name in files.tensors(forms)) + EMPTY_QUANTIZED_BYTES
    assert 0.65 * headers < 0.005 * files.num_bytes(forms)


@pytest.mark.parametrize("bits", [8, 4])
def test_shares_add_up(bits: int, tmp_path: Path) -> None:
    files = files_of(save_dense(tmp_path / "dense", "qwen2", **WIDE), bits)
    forms = pairs({target.name: 16 for target in files.targets[::2]})
    total = files.num_bytes(forms)
    tensors = files.tensors(forms)
    for part in (files.part(target) for target in files.targets):
        found = part.tensors({name: chosen for name, chosen in forms.items() if name == part.targets[0].name})
        assert found == {name: tensors[name] for name in found}
    inside = sum(
        files.part(target).share({name: chosen for name, chosen in forms.items() if name == target.name}, total)
        for target in files.targets
    )
    whole = {target.name for target in files.targets}
    others = {name: entry for name, entry in files.dense.items() if name.rpartition(".")[0] not in whole}
    outside = replace(files, dense=others, targets=[]).share({}, total)
    assert EMPTY_QUANTIZED_BYTES + inside + outside == files.most_bytes(forms, total)


# what is said


def cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    return int(done.value.code or 0)


SMALL = ("--preset", "paper", "--samples", "8", "--seqlen", "16")


@pytest.mark.parametrize("bits", [8, 4])
def test_from_plan_to_the_quantised_folder(
    bits: int, text: Path, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    dense = save_dense(tmp_path / "dense", tokenizer=tokenizer, **WIDE)
    budget = budget_of(files_of(dense, bits), 16)
    asked = (*SMALL, "--target-size", budget, "--factor-bits", bits)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "torchao", None)  # what cannot be imported
        assert cli("plan", dense, *asked, "--json") == 0
        planned = json.loads(capsys.readouterr().out)
        assert cli("plan", dense, *asked) == 0
        assert f"by `svdllm quantize` with --bits {bits} --format torchao" in " ".join(capsys.readouterr().out.split())
        assert cli("compress", dense, "-o", tmp_path / "out", "--calib", text, *asked) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"by `svdllm quantize` with --bits {bits} --format torchao" in said
    advice = re.search(r"svdllm (quantize \S+ -o (\S+) --bits \d --format torchao)", said)
    assert advice is not None
    assert str(planned["quantized_file_bytes"]) in json.dumps(read_report(tmp_path / "out"))
    assert f"chosen for {bits} bits" in (tmp_path / "out" / "README.md").read_text()
    assert all(rank % (16 if bits == 4 else 1) == 0 for rank in planned_ranks(planned))
    assert cli(*advice[1].split()) == 0
    assert size(Path(advice[2])) <= planned["quantized_file_bytes"] <= budget
    assert size(tmp_path / "out") == planned["file_bytes"]
    assert "chosen for" not in (Path(advice[2]) / "README.md").read_text()
    capsys.readouterr()
    assert cli("inspect", tmp_path / "out") == 0
    assert "once quantised" in capsys.readouterr().out
    assert cli("inspect", advice[2]) == 0
    assert "once quantised" not in capsys.readouterr().out
    recipe = tmp_path / "out" / "svdllm" / "recipe.yaml"
    assert make_recipe(load_settings(recipe)).factor_bits == bits
    assert cli("plan", dense, "--recipe", recipe, "--ratio", "0.3", "--json") == 0  # another budget, which has no bits
    assert json.loads(capsys.readouterr().out)["quantized_file_bytes"] is None


def planned_ranks(plan: dict[str, Any]) -> list[int]:
    return [target["rank"] for target in plan["targets"]]


def test_one_analysis_serves_every_number_of_bits(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense", **WIDE)
    ranks = []
    for bits, budget in ((None, 600_000), (8, 430_000), (4, 430_000)):
        recipe = small_recipe(target_size=budget, factor_bits=bits, round_to=16)
        result = run(dense, tmp_path / f"{bits}", recipe=recipe, analysis_dir=tmp_path / "analysis")
        ranks.append(sum(ranks_in(result.plan.forms).values()))
    assert ranks == sorted(set(ranks))


def test_before_the_analysis_ranks_of_the_same_size_stand_in(tmp_path: Path) -> None:
    """Keys and values of 16 x 160 have no rank in sixteens below break-even: they stay dense, then as now."""
    dense = save_dense(tmp_path / "dense", "llama", **WIDE, head_dim=16, num_key_value_heads=1)
    files = files_of(dense, 4, ignore=("k_proj", "v_proj"))
    budget = budget_of(files, 16)
    recipe = small_recipe(target_size=budget, factor_bits=4, round_to=16, allocation="loss")
    (planned,) = svdllm.plan(dense, recipe)
    assert not planned.forms_known
    assert planned.sizes.quantized_file_bytes is not None
    assert 0.97 * budget < planned.sizes.quantized_file_bytes <= budget
    assert {rank % 16 for rank in ranks_in(planned.forms).values()} == {0}
    assert set(planned.forms) == {target.name for target in files.targets}
    check(dense, tmp_path, 4, allocation="loss", ignore=("k_proj", "v_proj"))


def test_a_recipe_with_bits_is_one_method_of_a_comparison(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(small_recipe(target_size=10**6, factor_bits=8).to_yaml())
    (variant,) = variants_of([str(file)], {}, teacher="dense")
    assert variant.at(0.3).factor_bits is None


# refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.3, "factor_bits": 8}, "factor_bits does nothing without target_size"),
        ({"target_size": 10**6, "factor_bits": 5}, r"factor_bits: Input should be 8 or 4 \(found 5\)"),
        ({"target_size": 10**6, "factor_bits": 4, "round_to": 8}, "use round_to 16 or a multiple of it"),
        ({"target_size": 10**6, "factor_bits": 8, "allocation": "v2"}, "allocation v2 .* give a ratio"),
        ({"target_size": 10**6, "factor_bits": 8, "elastic": True}, "the budget is target_size; give a ratio"),
    ],
)
def test_what_a_recipe_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_recipe(settings)


def test_four_bits_have_ranks_in_sixteens_by_default(
    tmp_path: Path, text: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for settings in ({}, {"method": "svd"}):
        assert make_recipe({"target_size": 10**6, "factor_bits": 4, **settings}).round_to == 16
    dense = save_dense(tmp_path / "dense", tokenizer=tokenizer, **WIDE)
    asked = ("--target-size", budget_of(files_of(dense, 4), 32), "--factor-bits", "4", *SMALL)
    assert cli("plan", dense, *asked, "--round-to", "8") == 2
    assert "use round_to 16" in " ".join(capsys.readouterr().err.split())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("round_to: 32\n")
    assert cli("plan", dense, *asked, "--recipe", recipe, "--json") == 0
    assert all(rank % 32 == 0 for rank in planned_ranks(json.loads(capsys.readouterr().out)))


def test_sizes_that_cannot_be(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense", **WIDE)
    whole = files_of(dense, 8).num_bytes({})
    for budget, message in (
        (whole, rf"not below what the dense model has in 8 bits \({whole:,}\): nothing to compress"),
        (100_000, "--target-size 100,000 cannot be met"),
    ):
        with pytest.raises(InputError, match=message):
            svdllm.plan(dense, small_recipe(target_size=budget, factor_bits=8))
    with pytest.raises(InputError, match="leaves rank 0"):
        svdllm.plan(dense, small_recipe(target_size=whole - 1, factor_bits=8, overrides={"q_proj": 0.999}))
    AutoModelForCausalLM.from_pretrained(dense).half().save_pretrained(tmp_path / "half")
    with pytest.raises(InputError, match="stored in float16; 4 bits can be made of bfloat16 and float32 only"):
        svdllm.plan(tmp_path / "half", small_recipe(target_size=150_000, factor_bits=4, round_to=16))


@pytest.mark.parametrize("count", [1, 2, 5, 20])
@pytest.mark.parametrize("share", [0.34, 0.5, 0.51, 0.99])
def test_shares_hold_the_headers_of_as_many_files_as_there_can_be(share: float, count: int) -> None:
    """Tensors of a little more than half a file have one each, which is the worst that there is."""
    tensors: Tensors = {f"linear{number}.weight": ((int(share * SHARD_BYTES),), torch.int8) for number in range(count)}
    total = file_bytes(tensors)
    files = len(shard_names(tensors))
    assert files == -(-count // int(1 / share))
    assert files <= empty_files_bytes(total) // empty_files_bytes(0)
    assert share_of_files(tensors, total) + empty_files_bytes(total) >= total
