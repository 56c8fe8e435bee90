"""Exports of models in which every form occurs: they compute the same, and say what they changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import svdllm
from every_form import checkpoint_of_every_form, save_every_form
from families import tiny_model, tiny_tokens
from mixed import model_with
from quantized_models import cli
from runs import run, save_dense, small_recipe
from svdllm.checkpoint.report import read_report
from svdllm.common.errors import InputError, UnsupportedModelError
from svdllm.export import pairs
from svdllm.models.linears import linear_shape

FAMILIES = ["llama", "qwen2", "gemma3_text", "phi3", "gpt2", "opt", "gpt_neox", "falcon"]  # gated, fused, plain
WIDTH_FIELDS = {"gpt2": "n_inner", "opt": "ffn_dim", "falcon": "ffn_hidden_size"}
ORIGINAL = {"gpt2": 128}  # of 48


def logits_of(folder: Path) -> Tensor:
    with torch.no_grad():
        return svdllm.load_model(folder, dtype=torch.float64)(input_ids=tiny_tokens(2, 20)).logits


def forms_of(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / "config.json").read_text())["svdllm"]["forms"]


# dense


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_model_is_as_wide_as_the_widest_mlp(family: str, tmp_path: Path) -> None:
    mixed = save_every_form(tmp_path / "mixed", family, widths=(21, 32))
    assert svdllm.export_dense(mixed, tmp_path / "dense") == (32, 1)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config[WIDTH_FIELDS.get(family, "intermediate_size")] == 32
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(plain).__module__.startswith("transformers.")
    torch.testing.assert_close(logits_of(tmp_path / "dense"), logits_of(mixed), rtol=1e-5, atol=1e-6)


def test_mlps_of_one_width_need_no_zeros(tmp_path: Path) -> None:
    mixed = save_every_form(tmp_path / "mixed", widths=(24, 24))
    assert svdllm.export_dense(mixed, tmp_path / "dense") == (24, 0)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert all(module.weight.count_nonzero() == module.weight.numel() for module in dense.modules() if is_mlp(module))
    torch.testing.assert_close(logits_of(tmp_path / "dense"), logits_of(mixed), rtol=1e-5, atol=1e-6)


def is_mlp(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) and 24 in linear_shape(module)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2", "opt"])
def test_narrower_mlps_beside_a_whole_one_are_filled_up(family: str, tmp_path: Path) -> None:
    """With an activation that is a half at zero, and biases: zeros after it let nothing through."""
    field = {"gpt2": "activation_function", "opt": "activation_function"}.get(family, "hidden_act")
    mixed = save_every_form(tmp_path / "mixed", family, widths=(21, ORIGINAL.get(family, 48)), **{field: "sigmoid"})
    assert svdllm.export_dense(mixed, tmp_path / "dense") == (None, 1)
    torch.testing.assert_close(logits_of(tmp_path / "dense"), logits_of(mixed), rtol=1e-5, atol=1e-6)


def test_where_no_config_sets_the_width_alone_it_stays_the_original(tmp_path: Path) -> None:
    """Bloom's MLP is four times as wide as its hidden states, whatever config.json says."""
    mixed = save_every_form(tmp_path / "mixed", "bloom", widths=(21, 32))
    assert svdllm.export_dense(mixed, tmp_path / "dense") == (None, 2)
    torch.testing.assert_close(logits_of(tmp_path / "dense"), logits_of(mixed), rtol=1e-5, atol=1e-6)


# pairs


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_compute_exactly_what_packed_linears_do(family: str, tmp_path: Path) -> None:
    mixed = save_every_form(tmp_path / "mixed", family)
    made = svdllm.export_pairs(mixed, tmp_path / "pairs")
    torch.testing.assert_close(logits_of(tmp_path / "pairs"), logits_of(mixed), rtol=1e-12, atol=1e-12)
    before, after = forms_of(mixed), forms_of(tmp_path / "pairs")
    packed = {name for name, entry in before.items() if entry["form"] == "packed"}
    assert made.pairs == len(packed)
    assert made.dense == 0
    for name, entry in before.items():
        assert after[name] == (
            {**{k: entry[k] for k in entry if k != "side"}, "form": "pair"} if name in packed else entry
        )
    old, new = load_file(mixed / "model.safetensors"), load_file(tmp_path / "pairs" / "model.safetensors")
    kept = {name for name in old if not name.startswith(tuple(f"{name}." for name in packed))}
    assert all(torch.equal(old[name], new[name]) for name in kept)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "pairs", trust_remote_code=True, dtype=torch.float64)
    assert torch.equal(alone(input_ids=tiny_tokens(2, 20)).logits, logits_of(tmp_path / "pairs"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_pair_that_would_not_be_smaller_is_written_dense(family: str, tmp_path: Path) -> None:
    """Of rank 15: a linear of 32 x 32 is smaller as a pair, one of 16 x 32 or in a narrower MLP is not."""
    mixed = save_every_form(tmp_path / "mixed", family, rank=15, widths=(21, 21))
    made = svdllm.export_pairs(mixed, tmp_path / "pairs")
    assert made.dense > 0
    for name, entry in forms_of(tmp_path / "pairs").items():
        old = forms_of(mixed)[name]
        assert entry["form"] != "packed"
        if (old["form"], entry["form"]) == ("packed", "narrow"):
            assert {"out_features", "in_features"} & entry.keys()
    torch.testing.assert_close(logits_of(tmp_path / "pairs"), logits_of(mixed), rtol=1e-4, atol=1e-5)


def test_a_shared_first_factor_packed_by_columns_stays_shared(tmp_path: Path) -> None:
    names = [f"model.layers.0.self_attn.{leaf}_proj" for leaf in "kv"]
    entry = {"form": "packed", "side": "columns", "rank": 6}
    model = model_with("llama", dict.fromkeys(names, entry), shared_factors={names[1]: names[0]})
    first, second = map(model.get_submodule, names)
    second.order.copy_(first.order)
    model.save_pretrained(tmp_path / "mixed")
    svdllm.export_pairs(tmp_path / "mixed", tmp_path / "pairs")
    assert json.loads((tmp_path / "pairs" / "config.json").read_text())["svdllm"]["shared_factors"] == {
        names[1]: names[0]
    }
    torch.testing.assert_close(logits_of(tmp_path / "pairs"), logits_of(tmp_path / "mixed"), rtol=1e-12, atol=1e-12)
    svdllm.export_dense(tmp_path / "mixed", tmp_path / "dense")
    torch.testing.assert_close(logits_of(tmp_path / "dense"), logits_of(tmp_path / "mixed"), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    return checkpoint_of_every_form(save_dense(folder / "dense", "qwen2", tokenizer=tokenizer), folder / "mixed")


def test_a_checkpoint_of_pairs_is_a_whole_one(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pairs"
    assert cli("export", checkpoint, "-o", out, "--format", "pairs", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    before, after = read_report(checkpoint), read_report(out)
    assert found["pairs"] == sum(row["form"] == "packed" for row in before["linears"]) > 0
    assert (found["bytes_before"], found["bytes_after"]) == (before["file_bytes"], after["file_bytes"])
    unpacked = sum(row["rank"] ** 2 for row in before["linears"] if row["form"] == "packed")
    assert after["params"] == before["params"] + unpacked
    assert {row["form"] for row in after["linears"]} == {"pair", "narrow", "dense"}
    model = svdllm.load_model(out)
    assert after["params"] == model.num_parameters()
    left = sum(row["params"] for row in after["linears"])
    assert after["achieved_ratio"] == pytest.approx(
        1 - left / sum(r["out_features"] * r["in_features"] for r in after["linears"])
    )
    assert svdllm.verify(out)
    assert (out / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    torch.testing.assert_close(logits_of(out), logits_of(checkpoint), rtol=1e-12, atol=1e-12)
    assert cli("export", checkpoint, "-o", tmp_path / "dense", "--format", "dense") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "a plain model, as large as the original; 1 narrower MLPs are filled up with zeros." in said


def test_biases_of_a_correction_keep_a_linear_a_pair(tmp_path: Path, tokenizer: Any) -> None:
    dense = save_dense(tmp_path / "dense", tokenizer=tokenizer)
    ranks = {"q_proj": {"packed": 7}, "v_proj": {"packed": 14}, "up_proj": {"pair": 6}}  # 14 of 16 are no smaller
    mixed = run(dense, tmp_path / "mixed", recipe=small_recipe(ranks=ranks, bias_correction=True)).output_dir
    made = svdllm.export_pairs(mixed, tmp_path / "pairs")
    assert (made.pairs, made.dense) == (4, 0)
    torch.testing.assert_close(logits_of(tmp_path / "pairs"), logits_of(mixed), rtol=1e-12, atol=1e-12)
    assert svdllm.verify(tmp_path / "pairs")
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no place for"):
        svdllm.export_dense(mixed, tmp_path / "plain")


def test_mistakes_are_found_first(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "write_model", None)  # nothing is written
    svdllm.load_model(checkpoint).config.save_pretrained(tmp_path / "bare")
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match="dense has no packed linears, so there is nothing to write as pairs"):
        svdllm.export_pairs(tmp_path / "dense", tmp_path / "out")
    with pytest.raises(InputError, match="nothing is overwritten"):
        svdllm.export_pairs(checkpoint, checkpoint)
    with pytest.raises(
        InputError, match=r"\d packed linears, such as .*_proj, and processes cannot share these.*pairs"
    ):
        svdllm.export_padded(checkpoint, tmp_path / "out", 3)
    assert not (tmp_path / "out").exists()


# graphs


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_graphs_hold_every_form(format: str, tmp_path: Path) -> None:
    pytest.importorskip(
        "transformers.exporters.runners", reason="transformers before 5.23 has no graphs that are saved"
    )
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}[format])
    from svdllm.export.graphs import export_graph

    mixed = save_every_form(tmp_path / "mixed", {"onnx": "qwen2", "openvino": "llama"}[format])
    difference, has_cache = export_graph(mixed, tmp_path / "out", format)  # compares, at other lengths than traced
    assert 0 < difference < 1e-5
    assert has_cache
