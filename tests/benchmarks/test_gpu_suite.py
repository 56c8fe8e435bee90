"""The suite for GPUs on tiny shapes on the CPU: every step runs, and what it finds is on the page."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

import gpu_suite


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    gpu_suite.main(["--dry-run", "--output", str(folder), "--minutes", "60"])
    return folder


def test_every_step_of_a_dry_run_ends(output: Path):
    steps = json.loads((output / "gpu_suite.json").read_text(encoding="utf-8"))["steps"]
    assert list(steps) == list(gpu_suite.STEPS)
    assert not [name for name, found in steps.items() if "error" in found]
    assert {name: found["skipped"] for name, found in steps.items() if "skipped" in found} == {
        "compiled": "CUDA graphs need a GPU",
        "two_gpus": f"two GPUs are needed, and there are {torch.cuda.device_count()}",
    }
    assert steps["agreement"]["largest"] == 0  # the device is the CPU
    assert len(steps["agreement"]["relative_difference"]) == 18
    assert steps["distillation"]["tokens"] == 32
    assert steps["compression_70b"]["all_blocks"] == 80
    assert {cell["error"] for cell in steps["inference"]["cells"]} == {None}
    for row in steps["decomposition"]["linears"].values():
        assert row["ours_relative_loss"] == pytest.approx(row["paper_relative_loss"], rel=1e-3)


def test_the_page_has_a_section_for_every_step(output: Path):
    text = (output / "gpu_suite.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        f"## {name.replace('_', ' ').capitalize()}" for name in gpu_suite.STEPS
    ]
    assert text.count("Not measured") == 2


def test_a_step_that_fails_or_comes_too_late_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(suite: gpu_suite.Suite) -> gpu_suite.Record:
        raise RuntimeError("out of luck")

    monkeypatch.setitem(gpu_suite.STEPS, "agreement", broken)
    gpu_suite.main(["--dry-run", "--output", str(tmp_path), "--steps", "agreement,decomposition"])
    assert "Not measured: RuntimeError: out of luck" in (tmp_path / "gpu_suite.md").read_text(encoding="utf-8")
    record = gpu_suite.main(["--dry-run", "--output", str(tmp_path), "--steps", "decode", "--minutes", "-1"])
    assert record["steps"] == {"decode": {"skipped": "the time was over"}}


@pytest.mark.parametrize("ended_by", ["the time", "SIGTERM"])
def test_what_was_measured_is_kept_when_it_ends(ended_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def endless(suite: gpu_suite.Suite) -> gpu_suite.Record:
        if ended_by == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        try:
            time.sleep(60)
        except Exception:
            pytest.fail("a library would have gone on")
        return {}

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(gpu_suite.STEPS, "decode", endless)
    minutes = "10" if ended_by == "SIGTERM" else "0.05"
    started = time.monotonic()
    gpu_suite.main(
        ["--dry-run", "--output", str(tmp_path), "--steps", "decomposition,decode,latent", "--minutes", minutes]
    )
    assert time.monotonic() - started < 30
    steps = json.loads((tmp_path / "gpu_suite.json").read_text(encoding="utf-8"))["steps"]
    why = "SIGTERM" if ended_by == "SIGTERM" else "the time was over"
    assert steps["decomposition"]["speedup"] > 0
    assert steps["decode"]["skipped"].endswith(why)
    assert steps["latent"] == {"skipped": why}
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_computes_what_the_cpu_computes(tmp_path: Path):
    """Compressing, loading, fused factors, caches, packed and quantised forms."""
    record = gpu_suite.main(["--output", str(tmp_path), "--steps", "agreement"])
    assert record["steps"]["agreement"]["largest"] < 1e-4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        gpu_suite.main(["--output", str(tmp_path)])
    assert caught.value.code == 0
    assert "There is no GPU here" in "".join(capsys.readouterr())
