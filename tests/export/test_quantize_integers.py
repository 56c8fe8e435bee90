"""Models rounded to the nearest integers: dense and low-rank ones, as compressed-tensors packs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

import svdllm
from families import tiny_model
from quantized_models import cli, logits
from quantized_sources import CASES, write_models
from runs import save_dense
from svdllm.checkpoint.integers import packed_width
from svdllm.checkpoint.weight_sizes import weight_bytes
from svdllm.common.errors import InputError
from svdllm.export.quantize import quantize
from svdllm.models.open import open_config
from svdllm.models.skeleton import build_skeleton
from svdllm.models.weights import SafetensorsWeights

pytest.importorskip("compressed_tensors")


def _weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder, those in few bits unpacked by compressed-tensors."""
    weights = SafetensorsWeights(folder, build_skeleton(open_config(folder).config))
    return {name: weights.get(name).float() for name in weights.names()}


def _native(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2])
def test_no_group_loses_more_than_by_a_plain_quantiser(bits: int, dense: Path, tmp_path: Path) -> None:
    result = quantize(dense, tmp_path / "out", bits=bits)
    assert len(result.linears) == 14
    before, after = _weights(dense), _weights(tmp_path / "out")
    for name, weight in before.items():
        if not name.endswith("proj.weight"):
            assert torch.equal(after[name], weight), name
            continue
        groups = weight.unflatten(1, (-1, 64 if weight.shape[1] % 64 == 0 else 32))
        steps = groups.abs().amax(2, keepdim=True) / 2 ** (bits - 1)  # of codes -2^(b-1) to 2^(b-1) - 1
        plain = (groups / steps).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * steps
        errors = (after[name] - weight).unflatten(1, groups.shape[1:]).norm(dim=2)
        read_in_bfloat16 = 2**-8 * groups.norm(dim=2)
        assert bool((errors <= (plain - groups).norm(dim=2) + read_in_bfloat16).all()), name
        assert after[name].unflatten(1, groups.shape[1:])[0, 0].unique().numel() <= 2**bits


@pytest.mark.parametrize("bits", [8, 4])
def test_a_low_rank_checkpoint_keeps_what_it_says_of_itself(bits: int, checkpoint: Path, tmp_path: Path) -> None:
    result = quantize(checkpoint, tmp_path / "out", bits=bits)
    assert len(result.linears) == 2 * (4 * 2 + 3)
    assert result.by_scheme().keys() == {
        f"{bits} bits, a scale per {group}" for group in ("64 inputs", "32 inputs", "row")
    }
    svdllm.verify(tmp_path / "out")
    exact = svdllm.load_model(checkpoint, dtype=torch.float32)
    rounded = _weights(tmp_path / "out")
    exact.load_state_dict({name: rounded[name] for name in exact.state_dict() if name in rounded}, strict=False)
    found = logits(svdllm.load_model(tmp_path / "out", dtype=torch.float32))
    torch.testing.assert_close(found, logits(exact), rtol=1e-4, atol=1e-5)
    assert (found - logits(_native(tmp_path / "out"))).abs().max() < 0.02 * found.abs().max()
    report = json.loads((tmp_path / "out" / "svdllm" / "report.json").read_text())
    assert report["quantization"]["format"] == "compressed-tensors"
    assert report["file_bytes"] == weight_bytes(tmp_path / "out").files
    card = (tmp_path / "out" / "README.md").read_text()
    assert "needs the package\ncompressed-tensors" in card


def test_bytes_by_hand(tmp_path: Path) -> None:
    """In float32: three bits a weight, four bytes for every 64 inputs, and two integers of eight for the shape."""
    tiny_model("llama", hidden_size=128, intermediate_size=192).save_pretrained(tmp_path / "dense")
    quantize(tmp_path / "dense", tmp_path / "out", bits=3)
    linears = [w for name, w in _weights(tmp_path / "dense").items() if "proj" in name]
    expected = sum(4 * len(w) * packed_width(w.shape[1], 3) + 4 * w.numel() // 64 + 16 for w in linears)
    assert weight_bytes(tmp_path / "out").quantized == expected


def test_a_dense_folder_stays_one_of_its_family(dense: Path, tmp_path: Path) -> None:
    quantize(dense, tmp_path / "out", bits=4, group_size=32, skip=["o_proj"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "qwen2"
    groups = [group["weights"] for group in config["quantization_config"]["config_groups"].values()]
    assert [(group["num_bits"], group["group_size"]) for group in groups] == [(4, 32)]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        kept = {name for name in file.keys() if name.endswith("proj.weight")}  # noqa: SIM118
    assert kept == {f"model.layers.{block}.self_attn.o_proj.weight" for block in (0, 1)}
    ours = logits(svdllm.load_model(tmp_path / "out", dtype=torch.float32))
    assert (ours - logits(_native(tmp_path / "out"))).abs().max() < 0.02 * ours.abs().max()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt2"])
def test_stacked_experts_and_conv1d_stay_as_they_are(family: str, tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense", family)
    if family == "gpt2":
        with pytest.raises(
            InputError, match=r"Nothing is left to quantise: 8 linears in the blocks \(Conv1D, of which"
        ):
            quantize(dense, tmp_path / "out")
        return
    result = quantize(dense, tmp_path / "out", bits=8)
    assert all("experts." not in linear.name for linear in result.linears)
    expected = logits(svdllm.load_model(dense, dtype=torch.float32))
    found = logits(svdllm.load_model(tmp_path / "out", dtype=torch.float32))
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    assert (found - logits(_native(tmp_path / "out"))).abs().max() < 0.02 * found.abs().max()


def test_what_cannot_be_is_refused(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        ({"bits": 7}, "--bits 7 is not possible: expected one of 8, 6, 5, 4, 3, 2"),
        ({"group_size": 48}, "--group-size 48 is not possible: expected one of 32, 64, 128"),
        ({"format": "word"}, "Unknown format 'word'; known are compressed-tensors, torchao"),
    ):
        with pytest.raises(InputError, match=message):
            quantize(dense, tmp_path / "out", **options)
    quantized, _ = write_models(CASES["gptq 4"], tmp_path)
    for command in ((), ("--calib", "python-docs")):
        assert cli("quantize", quantized, "-o", tmp_path / "out", *command) == 2
        assert "is quantised already (GPTQ (4 bits))" in " ".join(capsys.readouterr().err.split())
    assert cli("quantize", dense, "-o", tmp_path / "out", "--format", "torchao", "--calib", "python-docs") == 2
    assert "--calib and --format torchao do not go together" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
