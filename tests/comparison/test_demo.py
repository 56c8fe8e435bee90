"""The demo's pipeline on a tiny model, and the errors in its table."""

from __future__ import annotations

import json
import math
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from runs import save_dense
from svdllm.checkpoint.report import read_report
from svdllm.cli import main
from svdllm.cli.tables import demo_table
from svdllm.comparison import demo
from svdllm.comparison.demo import DemoResult, DemoRow
from svdllm.models.gguf import MARKER


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    """A tiny model in the place of the one in the package."""

    def convert(file: Path, config: Any, folder: Path) -> None:
        save_dense(folder, tokenizer=tokenizer)
        (folder / MARKER).write_text("{}")

    monkeypatch.setattr(demo, "smollm2_file", lambda: Path("tiny.gguf"))
    monkeypatch.setattr(demo, "gguf_config", lambda file: None)
    monkeypatch.setattr(demo, "convert_gguf", convert)
    monkeypatch.setattr(demo, "SEQLEN", 16)


def test_the_demo_ends_with_four_rows_and_a_checkpoint(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as done:
        main(["demo", "-o", str(tmp_path / "out"), "--json"])
    assert not done.value.code
    document = json.loads(capsys.readouterr().out)
    assert [model["name"] for model in document["models"]] == ["dense", "plain SVD", "SVD-LLM", "balanced"]
    assert document["checkpoint"] == str(tmp_path / "out" / "balanced")
    report = read_report(tmp_path / "out" / "svd-llm")
    assert report["recipe"]["samples"] == demo.SAMPLES
    dense, *others = document["models"]
    assert dense["times_dense"] == 1
    assert dense["times_dense_stderr"] == 0
    for model in others:
        assert model["params"] < dense["params"]
        assert model["times_dense"] == pytest.approx(model["perplexity"] / dense["perplexity"])
    assert not (tmp_path / "out" / demo.STATISTICS).exists()


def test_a_hopeless_model_is_measured_on_the_first_windows_only(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from svdllm.common.progress import Reporter

    windows = demo._windows  # of a model that knows nothing: no other is a hundred times worse
    monkeypatch.setattr(demo, "HOPELESS", 1e-9)
    result = demo.run_demo(tmp_path / "out", ratio=0.2, samples=4, reporter=Reporter())
    assert windows(result.dense).shape == (demo.EVALUATION_WINDOWS, 16)
    assert [len(row.window_nlls) for row in result.rows] == [4, 2, 2, 2]


def test_errors_are_those_of_the_mean_and_of_the_differences() -> None:
    """By hand: means 2 and 2.5, differences 0.25 and 0.75, of which the standard error is 0.25."""
    dense, ours = (
        DemoRow(name=name, model=Path(name), params=1, weight_bytes=1, window_nlls=nlls)
        for name, nlls in (("dense", (1.0, 3.0, 5.0)), ("ours", (1.25, 3.75)))
    )
    assert dense.perplexity == pytest.approx(math.exp(3))
    assert dense.stderr == pytest.approx(math.exp(3) * 2 / math.sqrt(3))
    assert ours.times(dense) == pytest.approx((math.exp(0.5), math.exp(0.5) * 0.25))


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    dense = DemoRow(name="dense", model=Path("d"), params=134515008, weight_bytes=538_090_000, window_nlls=(2.6, 3.0))
    ours = {"model": Path("m"), "params": 113281344, "weight_bytes": 453_200_000, "compression_seconds": 754.0}
    rows = [DemoRow(name="plain SVD", window_nlls=(14.9, 15.6), **ours), DemoRow(name="x", window_nlls=(2, 4), **ours)]
    console = Console(width=80, file=StringIO())
    console.print(demo_table(DemoResult(rows=[dense, *rows])))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown
    assert "4.2e6 ± 1.5e6" in shown
    assert "12 min 34 s" in shown
