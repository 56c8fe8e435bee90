"""Quantised folders: what they can be used for, and what is refused."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TorchAoConfig

import svdllm
from quantized_models import cli, load, logits
from runs import TEXT, run, small_recipe
from svdllm.common.errors import InputError, ResourceError
from svdllm.common.progress import Reporter
from svdllm.export.quantize import quantize

QUANTIZE = importlib.import_module("svdllm.export.quantize")

# uses


def test_a_dense_model_loads_everywhere(dense: Path, tmp_path: Path) -> None:
    result = quantize(dense, tmp_path / "out", bits=4, format="torchao")
    assert result.by_scheme() == {"4 bits, a scale per 16 inputs": 14}
    assert result.bytes_after == (tmp_path / "out" / "model.safetensors").stat().st_size < result.bytes_before
    model = load(tmp_path / "out")
    assert type(model).__module__.startswith("transformers.")
    assert not (tmp_path / "out" / "svdllm").exists()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()


def test_four_bits_of_bfloat16_compute_in_float32(dense: Path, tmp_path: Path) -> None:
    load(dense, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    quantize(tmp_path / "half", tmp_path / "out", bits=4, format="torchao")
    assert logits(load(tmp_path / "out")).dtype == torch.bfloat16
    found = logits(svdllm.load_model(tmp_path / "out", dtype=torch.float32))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits(load(tmp_path / "out")).float(), rtol=0.1, atol=0.1)


def test_without_the_library(in8: Path, tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "sys.modules['svdllm'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "torch.save(model(torch.arange(8)[None]).logits, sys.argv[2])\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", script, str(in8), str(tmp_path / "logits")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits"), load(in8)(torch.arange(8)[None]).logits)


def test_eval_verify_inspect(in4: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    assert cli("eval", in4, "--base", dense, "--ppl", tmp_path / "text.txt", "--seqlen", "16", "--json") == 0
    ours, theirs = json.loads(capsys.readouterr().out)["results"]
    assert ours["weight_bytes"] == (in4 / "model.safetensors").stat().st_size < theirs["weight_bytes"]
    assert ours["params"] == svdllm.load_model(in4).num_parameters() < theirs["params"]
    assert cli("verify", in4) == 0
    assert "largest difference" in capsys.readouterr().out
    assert cli("inspect", in4) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "quantised 4 bits, a scale per 16 inputs (18 linears); 8 bits, a scale per row (4 linears)" in said
    assert cli("inspect", in4, "--json") == 0
    entry = json.loads(capsys.readouterr().out)["quantization"]
    assert entry["bits"] == 4
    assert entry["other_schemes"]["model.layers.0.self_attn.v_proj.svd_u"] == "32 x 9 is not in groups of 16"
    assert "4 bits" in (in4 / "README.md").read_text()
    altered = shutil.copytree(in4, tmp_path / "altered")
    content = bytearray((altered / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (altered / "model.safetensors").write_bytes(bytes(content))
    assert cli("verify", altered) == 2
    assert "model.safetensors: expected SHA-256" in " ".join(capsys.readouterr().err.split())


def test_command_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli("quantize", checkpoint, "--format", "torchao", "-o", tmp_path / "a", "--bits", "4", "--skip", "q_proj") == 0
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "14 in 4 bits, a scale per 16 inputs" in said
    assert "4 of them for their shape, as model.layers.0.self_attn.v_proj.svd_v: 9 x 64 is not in groups of 16" in said
    assert "model.embed_tokens, lm_head (outside the blocks)" in said
    assert cli("quantize", checkpoint, "--format", "torchao", "-o", tmp_path / "b", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["by_scheme"] == {"8 bits, a scale per row": 22}
    assert result["bytes_after"] == (tmp_path / "b" / "model.safetensors").stat().st_size


# refusals


@pytest.mark.parametrize(
    "arguments",
    [
        ("compress", "-o", "OUT", "--ratio", "0.3", "--calib", "python-docs"),
        ("plan", "--ratio", "0.3"),
        ("slice", "-o", "OUT", "--ratio", "0.5"),
        ("export", "-o", "OUT"),
        ("recover", "-o", "OUT", "--data", "python-docs"),
        ("quantize", "-o", "OUT", "--bits", "4", "--format", "torchao"),
        ("compare", "-o", "OUT", "--methods", "svd", "--ratios", "0.3", "--ppl", "python-docs"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_needs_the_weights_refuses_a_quantised_model(
    arguments: tuple[str, ...], in8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli(arguments[0], in8, *(out if word == "OUT" else word for word in arguments[1:])) == 3
    assert "is quantised (torchao). Quantisation comes last" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "--bits 5 is not possible"),
        ({"bits": 4, "group_size": 32}, "--group-size 32 is not possible with --bits 4"),
        ({"group_size": 0}, "--group-size must be at least 1"),
        ({"skip": ["nothing"]}, "--skip 'nothing' matches none of the 22 linears"),
        ({"skip": ["proj"]}, "Nothing is left to quantise: 22 linears"),
        ({"device": "cuda:9"}, "--device 'cuda:9' is not available"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        quantize(checkpoint, tmp_path / "out", **options, format="torchao")
    assert list(tmp_path.iterdir()) == []


def test_other_things_that_cannot_be(
    dense: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(dense, dtype=torch.float16).save_pretrained(tmp_path / "half")
    with pytest.raises(InputError, match=r"stored in float16; 4 bits can be made of bfloat16 and float32 only"):
        quantize(tmp_path / "half", tmp_path / "out", bits=4, format="torchao")
    with pytest.raises(InputError, match="exists and is a folder with other things"):
        quantize(checkpoint, tmp_path, format="torchao")
    (tmp_path / "out.writing").mkdir()
    with pytest.raises(InputError, match=r"out\.writing is in the way"):
        quantize(checkpoint, tmp_path / "out", format="torchao")
    (tmp_path / "out.writing").rmdir()
    bare = shutil.copytree(checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("svdllm"))
    with pytest.raises(InputError, match="download the whole repository first"):
        quantize(bare, tmp_path / "out", format="torchao")
    monkeypatch.setattr("svdllm.common.memory.available_bytes", lambda: 1000)
    with pytest.raises(ResourceError, match=r"GB of memory, 0\.00 GB are free"):
        quantize(checkpoint, tmp_path / "out", format="torchao")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(ResourceError, match="GB free, the weights need"):
        quantize(checkpoint, tmp_path / "out", format="torchao")
    assert not (tmp_path / "out").exists()


def test_a_missing_library_is_named(
    checkpoint: Path, in8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("svdllm.common.extras.importlib.util.find_spec", lambda name: None)
    for command in (
        ("quantize", checkpoint, "-o", tmp_path / "out", "--format", "torchao"),
        ("eval", in8, "--ppl", "python-docs"),
        ("verify", in8),
    ):
        assert cli(*command) == 2
        assert "needs the package 'torchao': pip install 'svdllm[quantize]'" in " ".join(
            capsys.readouterr().err.split()
        )


def test_a_failure_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(QUANTIZE, "finish_checkpoint", fail)
    with pytest.raises(KeyboardInterrupt):
        quantize(checkpoint, tmp_path / "out", format="torchao")
    assert list(tmp_path.iterdir()) == []


def test_an_elastic_checkpoint_loses_its_sizes(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "elastic", recipe=small_recipe(elastic=True))
    reporter = Reporter()
    quantize(tmp_path / "elastic", tmp_path / "out", reporter=reporter, format="torchao")
    assert "smaller sizes of this elastic checkpoint are not carried over" in reporter.warnings[0]
    assert not list((tmp_path / "out").rglob("elastic*"))
    assert "svdllm slice" not in (tmp_path / "out" / "README.md").read_text()


def test_quantised_on_loading_is_the_same(checkpoint: Path, in8: Path) -> None:
    """What transformers makes of the checkpoint with torchao's own default is what is stored."""
    from torchao.quantization import Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False), modules_to_not_convert=["lm_head"])
    assert torch.equal(logits(load(checkpoint, quantization_config=config)), logits(load(in8)))
