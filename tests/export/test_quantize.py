"""Quantised factors: what is rounded and how far, what files hold, and which linears are quantised."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import svdllm
from families import tiny_model
from quantized_models import load, logits
from runs import digests, run, save_dense, small_recipe
from svdllm.checkpoint.quantized import (
    ENTRY_BYTES,
    NOTE_BYTES,
    Scheme,
    choose_schemes,
    make_scheme,
    quantized_bytes,
    weights_pattern,
)
from svdllm.checkpoint.tensors import stored_tensors
from svdllm.checkpoint.weight_sizes import weight_bytes
from svdllm.common.errors import InputError
from svdllm.export.quantize import quantize
from svdllm.models.open import open_config
from svdllm.models.skeleton import build_skeleton

QUANTIZE_TORCHAO = importlib.import_module("svdllm.export.quantize_torchao")


def rounded(folder: Path) -> dict[str, Tensor]:
    """The weights in few bits, as numbers."""
    found = load(folder).named_parameters()
    return {name: weight.dequantize() for name, weight in found if hasattr(weight, "tensor_data_names")}


def by_hand(weight_OI: Tensor) -> Tensor:
    """Symmetric, a scale per row: 256 steps from the negative of its largest magnitude to one step below that."""
    scale_O1 = 2 * weight_OI.abs().amax(dim=1, keepdim=True) / 255
    return (weight_OI / scale_O1).round().clamp(-128, 127) * scale_O1


# numbers


def test_eight_bits_are_those_of_a_quantiser_made_by_hand(checkpoint: Path, in8: Path) -> None:
    weights = dict(load(checkpoint).named_parameters())
    found = rounded(in8)
    assert len(found) == 2 * (4 * 2 + 3)  # of two blocks: four pairs of factors, three dense linears
    for name, values in found.items():
        weight = weights[name].detach()
        # The errors, not the values: the largest of a row lies half-way between two steps.
        torch.testing.assert_close((values - weight).abs(), (by_hand(weight) - weight).abs(), rtol=1e-4, atol=1e-6)
        assert 0.001 < (values - weight).norm() / weight.norm() < 0.01


def test_groups_of_inputs_have_scales_of_their_own(checkpoint: Path, tmp_path: Path) -> None:
    result = quantize(checkpoint, tmp_path / "out", group_size=16, format="torchao")
    weights = dict(load(checkpoint).named_parameters())
    for name, values in rounded(tmp_path / "out").items():
        weight = weights[name].detach()
        width = 16 if weight.shape[1] % 16 == 0 else weight.shape[1]
        steps = weight.unflatten(1, (-1, width)).abs().amax(dim=2, keepdim=True) / 127.5
        errors = (values - weight).abs().unflatten(1, (-1, width))
        assert bool((errors <= 0.501 * steps).all()), name
    others = {linear.name: linear for linear in result.linears if linear.reason}
    assert set(others) == {f"model.layers.{block}.self_attn.v_proj.svd_u" for block in (0, 1)}  # of rank 9
    assert {linear.scheme for linear in others.values()} == {Scheme(8)}


def test_four_bits_are_within_the_steps_of_their_format(checkpoint: Path, in4: Path) -> None:
    """Of E2M1 the widest gap is a third of the largest number; a scale of E4M3 is off by a sixteenth at most."""
    weights = dict(load(checkpoint).named_parameters())
    packed = {name.rpartition(".")[0] for name in few_bits(in4, "NVFP4Tensor")}
    assert not any("v_proj" in name for name in packed)
    assert "model.layers.1.mlp.down_proj.svd_u" in packed
    for name, values in rounded(in4).items():
        if name.rpartition(".")[0] not in packed:
            continue
        weight = weights[name].detach()
        groups = weight.unflatten(1, (-1, 16))
        largest = groups.abs().amax(dim=2, keepdim=True)
        errors = (values - weight).unflatten(1, (-1, 16))
        assert bool((errors.abs() <= (1 / 6 + 1 / 16) * largest).all()), name
        assert 0.05 < (values - weight).norm() / weight.norm() < 0.15
        assert all(len(row.abs().unique()) <= 8 for row in values.unflatten(1, (-1, 16)).flatten(0, 1))


def few_bits(folder: Path, kind: str) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    return {name for name in json.loads(metadata["tensor_names"]) if json.loads(metadata[name])["_type"] == kind}


@pytest.mark.parametrize("form", ["in8", "in4"])
def test_the_model_computes_with_the_rounded_weights(
    form: str, checkpoint: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(form)
    expected = load(checkpoint)
    missing = expected.load_state_dict(rounded(folder), strict=False).missing_keys
    assert all("proj" not in name or name.endswith("bias") for name in missing)
    torch.testing.assert_close(logits(load(folder)), logits(expected), rtol=1e-4, atol=1e-5)


# files


@pytest.mark.parametrize("form", ["in8", "in4"])
def test_a_second_round_trip_changes_nothing(form: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(form)
    model = load(folder)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    assert (tmp_path / "again" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".py", ".md", ".yaml", ".jinja"}


def test_the_folder_is_the_checkpoint_with_other_weights(checkpoint: Path, in8: Path) -> None:
    before, after = digests(checkpoint), digests(in8)
    assert set(before) == set(after)
    differing = {name for name in before if before[name] != after[name]}
    expected = {"model.safetensors", "config.json", "README.md", "svdllm/hashes.json", "svdllm/reference.safetensors"}
    assert differing == expected
    assert (in8 / "model.safetensors").stat().st_mode == (in8 / "config.json").stat().st_mode
    reference = load_file(in8 / "svdllm/reference.safetensors")
    with torch.no_grad():
        found = load(in8)(reference["token_ids"]).logits[:, -4:]
    torch.testing.assert_close(found, reference["logits"])


def test_several_files(checkpoint: Path, in8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QUANTIZE_TORCHAO, "SHARD_BYTES", 40_000)
    quantize(checkpoint, tmp_path / "out", format="torchao")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert weight_bytes(tmp_path / "out").files == sum(path.stat().st_size for path in files)
    assert weight_bytes(tmp_path / "out").quantized == weight_bytes(in8).quantized
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(in8)))
    svdllm.verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype"),
    [(8, None, "float32"), (8, 16, "bfloat16"), (4, None, "bfloat16"), (8, None, "float16")],
)
def test_bytes_are_known_beforehand(
    bits: int, group_size: int | None, dtype: str, tmp_path: Path, tokenizer: Any
) -> None:
    folder = tmp_path / "dense"
    model = tiny_model("llama", vocab_size=300, hidden_size=144, intermediate_size=200).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    source = open_config(folder)
    skeleton = build_skeleton(source.config)
    linears, _ = choose_schemes(skeleton, make_scheme(bits, group_size))
    schemes = {f"{linear.name}.weight": linear.scheme for linear in linears}
    predicted = quantized_bytes(stored_tensors(source, skeleton), schemes, num_files=1)
    quantize(folder, tmp_path / "out", bits=bits, group_size=group_size, format="torchao")
    file = tmp_path / "out" / "model.safetensors"
    counted = weight_bytes(tmp_path / "out")
    assert counted.files == file.stat().st_size
    headers = sum(ENTRY_BYTES + NOTE_BYTES + 5 * len(name) for name in stored_tensors(source, skeleton))
    assert predicted - headers == counted.quantized + counted.other
    assert 0.35 * headers < counted.headers < headers
    assert counted.headers == 8 + int.from_bytes(file.read_bytes()[:8], "little")


def test_bytes_by_hand(dense: Path, tmp_path: Path) -> None:
    """Two blocks of 64, 96 and half as many keys; weights of one byte, five more for every row."""
    quantize(dense, tmp_path / "out", format="torchao")
    rows = 64 + 32 + 32 + 64 + 96 + 96 + 64
    weights = 64 * (64 + 32 + 32 + 64 + 96 + 96) + 64 * 96
    others = 300 * 64 + 2 * (64 + 32 + 32 + 2 * 64) + 64  # the tied embedding, biases and norms
    counted = weight_bytes(tmp_path / "out")
    assert counted.quantized == 2 * (weights + 5 * rows)
    assert counted.other == 4 * others
    assert counted.files_at_16_bits == counted.files - 2 * others
    assert weight_bytes(dense).quantized == 0
    assert weight_bytes(dense).files_at_16_bits == weight_bytes(dense).files - 2 * (others + 2 * weights)


# which linears


def test_what_is_left_is_said(dense: Path) -> None:
    skeleton = build_skeleton(open_config(dense).config)
    linears, left = choose_schemes(skeleton, Scheme(8), skip=[r"layers\.0\.mlp", "k_proj"])
    names = {linear.name for linear in linears}
    assert left.pop("model.embed_tokens") == left.pop("lm_head") == "outside the blocks"
    assert set(left.values()) == {"--skip"}
    assert set(left) == {f"model.layers.0.mlp.{kind}_proj" for kind in ("gate", "up", "down")} | {
        f"model.layers.{block}.self_attn.k_proj" for block in (0, 1)
    }
    assert len(names) == 14 - 5
    assert not names & set(left)


def test_a_skipped_linear_is_stored_as_it_was(checkpoint: Path, tmp_path: Path) -> None:
    quantize(checkpoint, tmp_path / "out", skip=["down_proj.svd_u"], format="torchao")
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    kept = {name for name in before if name in after}
    assert "model.layers.0.mlp.down_proj.svd_u.weight" in kept
    assert "model.layers.0.self_attn.q_proj.svd_u.bias" in kept  # no bias is rounded
    assert "model.layers.0.mlp.down_proj.svd_v.weight" not in kept
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_linears_of_another_kind_are_left(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "gpt2", "gpt2")
    with pytest.raises(InputError, match=r"Nothing is left to quantise: 8 linears in the blocks \(Conv1D, of which"):
        quantize(dense, tmp_path / "out", format="torchao")
    run(dense, tmp_path / "small", recipe=small_recipe(ranks={"c_fc": 8}))
    result = quantize(tmp_path / "small", tmp_path / "small8", format="torchao")
    assert {linear.name for linear in result.linears} == {
        f"transformer.h.{block}.mlp.c_fc.svd_{factor}" for block in (0, 1) for factor in "uv"
    }
    assert torch.isfinite(logits(load(tmp_path / "small8"))).all()


def test_the_pattern_is_of_these_weights_only() -> None:
    pattern = weights_pattern(["m.layers.0.a.b", "m.layers.11.a.b", "m.layers.1.a"])
    matched = re.compile(pattern.removeprefix("re:"))
    for name in ("m.layers.0.a.b.weight", "m.layers.11.a.b.weight", "m.layers.1.a.weight"):
        assert matched.fullmatch(name)
    for name in (
        "m.layers.1.a.b.weight",
        "m.layers.0.a.b",
        "m.layers.0.a.b.bias",
        "m.layers.0.a.weight",
        "mxlayers.1.a",
    ):
        assert not matched.fullmatch(name)
