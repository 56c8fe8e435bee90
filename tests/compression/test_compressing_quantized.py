"""Compressing a quantised source is compressing the dense model of its dequantised weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import svdllm
from quantized_models import cli
from quantized_sources import CASES, write_models
from runs import digests, run, small_recipe
from svdllm import recover
from svdllm.compression import memory_needs
from svdllm.models.open import open_source
from svdllm.recovery import make_recovery

NAMED = ("README.md", "config.json", "svdllm/report.json", "svdllm/hashes.json")  # with the name of the source in them


@pytest.mark.parametrize("name", ["fp8", "mxfp4", "gptq 4"])
def test_factors_are_those_of_the_dense_model(name: str, tmp_path: Path) -> None:
    quantized, dense = write_models(CASES[name], tmp_path)
    for source in (quantized, dense):
        run(source, tmp_path / f"of-{source.name}")
    ours, theirs = tmp_path / "of-quantized", tmp_path / "of-dense"
    assert digests(ours, NAMED) == digests(theirs, NAMED)
    assert "quantization_config" not in json.loads((ours / "config.json").read_text())
    assert svdllm.load_model(ours).dtype == CASES[name].dtype
    assert open_source(ours).dtype == CASES[name].dtype
    report = json.loads((ours / "svdllm" / "report.json").read_text())
    assert report["dense_params"] == json.loads((theirs / "svdllm" / "report.json").read_text())["dense_params"]
    assert report["quantized_source"]["file_bytes"] == (quantized / "model.safetensors").stat().st_size
    assert "dequantised to" in (ours / "README.md").read_text()
    svdllm.verify(ours)


def test_plan_says_what_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_needs, "resident_bytes", lambda: 0)
    quantized, dense = write_models(CASES["fp8 fp4"], tmp_path)
    ours, theirs = (svdllm.plan(source, small_recipe())[0] for source in (quantized, dense))
    assert ours.sizes == theirs.sizes
    assert theirs.quantized_source is None
    assert ours.quantized_source is not None
    assert ours.quantized_source.text == "FP8 source, dequantised to bfloat16 on reading"
    size = (quantized / "model.safetensors").stat().st_size
    assert ours.quantized_source.file_bytes == size < ours.file_bytes
    assert any("the FP8 source only" in warning for warning in ours.warnings)
    assert not any("source only" in warning for warning in theirs.warnings)
    assert ours.peak_ram_bytes > theirs.peak_ram_bytes
    assert cli("plan", quantized, "--ratio", "0.3", "--samples", "8", "--seqlen", "16") == 0
    assert "FP8 source, dequantised to bfloat16 on reading" in " ".join(capsys.readouterr().out.split())


def test_a_quantised_teacher(text: Path, tokenizer: Any, tmp_path: Path) -> None:
    """A quantised dense model teaches as the dense model of its dequantised weights does."""
    quantized, dense = write_models(CASES["gptq 4"], tmp_path)
    tokenizer.save_pretrained(dense)
    run(dense, tmp_path / "compressed")
    trained = []
    for teacher in (quantized, dense):
        settings = {"methods": ["distill"], "data": str(text), "seqlen": 16, "batch": 4, "steps": 3, "kl": 1.0}
        out = tmp_path / f"taught-by-{teacher.name}"
        recover(tmp_path / "compressed", out, make_recovery({**settings, "teacher": str(teacher)}))
        trained.append(digests(out)["model.safetensors"])
    assert trained[0] == trained[1]
    assert trained[0] != digests(tmp_path / "compressed")["model.safetensors"]


def test_perplexity_is_that_of_the_dense_model(
    text: Path, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantized, dense = write_models(CASES["fp8 scale"], tmp_path)
    for folder in (quantized, dense):
        tokenizer.save_pretrained(folder)
    options = ("--ppl", text, "--seqlen", "16", "--max-windows", "4", "--json")
    assert cli("eval", quantized, "--base", dense, *options) == 0
    ours, theirs = json.loads(capsys.readouterr().out)["results"]
    assert ours["perplexity"] == theirs["perplexity"]
    assert ours["params"] == theirs["params"]
    assert ours["weight_bytes"] == (quantized / "model.safetensors").stat().st_size


@pytest.mark.parametrize("name", ["fp8", "hqq"])
def test_nothing_is_written_of_what_cannot_be_read(name: str, tmp_path: Path) -> None:
    quantized, _ = write_models(CASES["fp8"], tmp_path)
    settings = {"quant_method": "fp8", "weight_block_size": [4, 4]} if name == "fp8" else {"quant_method": "hqq"}
    config = json.loads((quantized / "config.json").read_text()) | {"quantization_config": settings}
    (quantized / "config.json").write_text(json.dumps(config))
    output = tmp_path / "out"
    assert cli("compress", quantized, "-o", output, "--ratio", "0.3") == (2 if name == "fp8" else 3)
    assert not output.exists()
