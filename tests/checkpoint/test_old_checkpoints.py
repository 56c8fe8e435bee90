"""Checkpoints that svdllm 0.1 wrote (format version 1) are still read, by the library and by their own code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from svdllm import export_dense, load_model, slice_checkpoint, verify
from svdllm.checkpoint.report import REPORT_FILE, read_report
from svdllm.cli import main

FOLDERS = sorted(path.parent for path in (Path(__file__).parents[1] / "checkpoints").glob("*/config.json"))


def logits_of(folder: Path, **how: Any) -> torch.Tensor:
    reference = load_file(folder / "svdllm" / "reference.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
    with torch.no_grad():
        return model(reference["token_ids"]).logits[:, -reference["logits"].shape[1] :]


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if "quantized" in request.param.name:
        pytest.importorskip("torchao")
    return Path(shutil.copytree(request.param, tmp_path / request.param.name))


def test_there_are_three_of_them() -> None:
    assert [folder.name for folder in FOLDERS] == ["bias-corrected", "elastic-joint-kv", "trained-quantized"]
    reports = [json.loads((folder / "svdllm" / "report.json").read_text()) for folder in FOLDERS]
    assert {(report["format_version"], report["versions"]["svdllm"]) for report in reports} == {(1, "0.1.0")}


def test_an_old_checkpoint_is_verified_and_computes_what_it_did(old: Path) -> None:
    assert [name for name, _ in verify(old)] == ["hashes", "shapes", "finite", "logits"]
    wanted = load_file(old / "svdllm" / "reference.safetensors")["logits"]
    torch.testing.assert_close(logits_of(old), wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits_of(old, trust_remote_code=True), wanted, rtol=1e-3, atol=1e-4)
    assert AutoTokenizer.from_pretrained(old)("a text")["input_ids"]


def test_an_old_report_is_inspected(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(old), "--json"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["params"] == json.loads((old / "svdllm" / "report.json").read_text())["params"]


def test_an_old_elastic_checkpoint_is_sliced(tmp_path: Path) -> None:
    (folder,) = (folder for folder in FOLDERS if "elastic" in folder.name)
    result = slice_checkpoint(folder, 0.5, tmp_path / "half")
    assert result.plan.achieved_ratio >= 0.5
    verify(tmp_path / "half")


def test_an_old_checkpoint_is_exported(tmp_path: Path) -> None:
    (folder,) = (folder for folder in FOLDERS if "elastic" in folder.name)
    export_dense(folder, tmp_path / "dense")
    ids = torch.arange(3, 19).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "dense")(ids).logits, load_model(folder)(ids).logits)


def test_a_report_of_0_1_is_read_in_todays_form(tmp_path: Path) -> None:
    """There ``ratio`` was the one reached."""
    (tmp_path / "svdllm").mkdir()
    report = {"linears": [], "source": {}, "recipe": {"ratio": 0.3}, "params": 1, "ratio": 0.312}
    (tmp_path / REPORT_FILE).write_text(json.dumps(report))
    found = read_report(tmp_path)
    assert (found["ratio"], found["achieved_ratio"]) == (0.3, 0.312)
