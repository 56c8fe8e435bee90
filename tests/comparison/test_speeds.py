"""Time, memory and speed of the models of a comparison, in its records and its report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runs import TEXT, save_dense
from svdllm.cli import main
from svdllm.comparison import speeds
from svdllm.comparison.costs import cost_notes, cost_table

METHODS = "flap,slicegpt,svd-llm,gptq-4,same={dense}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("speeds")
    save_dense(folder / "dense", tokenizer=tokenizer, num_hidden_layers=4)
    (folder / "text.txt").write_text(TEXT)
    return folder


def compare(place: Path, report: Path, methods: str, *more: str) -> int:
    text = str(place / "text.txt")
    options = ["--ratios", "0.25", "--calib", text, "--samples", "4", "--seqlen", "16", "--ppl", text, *more]
    options += ["--ppl-seqlen", "16", "--ppl-windows", "3", "--new-tokens", "0", "--offline"]
    with pytest.raises(SystemExit) as end:
        main(["compare", str(place / "dense"), "-o", str(report), "--methods", methods, *options])
    return int(str(end.value.code))


def test_every_kept_model_is_measured_beside_the_dense_one(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speeds, "SETTINGS", replace(speeds.SETTINGS, gen=4, repeats=2))
    report = tmp_path / "report"
    methods = METHODS.format(dense=place / "dense")
    assert compare(place, report, methods, "--bench") == 0
    cells = {cell["name"]: cell for cell in json.loads((report / "report.json").read_text())["cells"]}
    assert cells["dense"]["speed"] is None
    for name in ("flap 0.25", "slicegpt 0.25", "svd-llm 0.25"):
        speed, peaks = cells[name]["speed"], cells[name]["peak_bytes"]
        assert speed["error"] is None
        assert (speed["prompt"], speed["gen"]) == (60, 4)  # what the context of the model leaves
        turns = zip(*(speed[kind]["decode"]["seconds"]["values"] for kind in ("dense", "model")), strict=True)
        assert speed["model"]["decode"]["speed_up"]["values"] == pytest.approx([ours / own for ours, own in turns])
        assert speed["model"]["memory"]["weights"] == 4 * cells[name]["params"]
        assert peaks["ram"] > cells[name]["weight_bytes"]
    assert cells["same"]["speed"]["error"] is None
    assert "simulated" in cells["gptq-4"]["speed"]["error"]
    for text in ((report / "report.md").read_text(), (report / "report.html").read_text()):
        assert "prefill, tokens/s" in text
        assert "gptq-4 has no speed: simulated" in text

    stamps = {file.name: file.stat().st_mtime_ns for file in (report / "speeds").iterdir() if "gptq" not in file.name}
    monkeypatch.setattr(speeds, "_speed", None)  # a second run measures nothing
    assert compare(place, report, methods, "--bench") == 0
    assert stamps.items() <= {file.name: file.stat().st_mtime_ns for file in (report / "speeds").iterdir()}.items()


def test_a_model_that_was_not_kept_says_so(place: Path, tmp_path: Path) -> None:
    assert compare(place, tmp_path / "report", "svd") == 0
    before = (tmp_path / "report/report.md").read_text()
    assert "## Time, memory and speed" in before
    assert "tokens/s" not in before
    assert compare(place, tmp_path / "report", "svd", "--bench") == 0
    assert "svd 0.25 has no speed: its checkpoint was not kept" in (tmp_path / "report/report.md").read_text()


def record(name: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "variant": name,
        "status": "done",
        "compression_seconds": {"analyze": 50.0, "write": 10.0},
    } | more


def test_the_table_has_time_memory_and_speed() -> None:
    spread = {"median": 1.5, "lower_quartile": 1.25, "upper_quartile": 2.0}
    phase = {"tokens_per_second": 1234.5, "speed_up": spread}
    cell = {"prefill": phase, "decode": phase, "memory": {"peak": 5e8}}
    machine = {"device": "a CPU", "threads": 2, "dtype": "float32"}
    speed = {"error": None, "prompt": 8, "gen": 4, "machine": machine, "model": cell, "dense": cell}
    trained = [{"stages": [{"seconds": 40.0}]}]
    records = [
        record("one", peak_bytes={"ram": 2.5e9, "device": 1e9}, speed=speed, recovery=trained),
        record("two", peak_bytes={"ram": None, "device": 0}, speed={"error": "out of memory"}),
        record("dense", variant=None),
        record("gone", status="failed"),
    ]
    headings, rows = cost_table(records)
    assert len(headings) == len(rows[0]) == len(rows[1]) == 8
    fast = ("1,234", "1.50 [1.25, 2.00]")
    assert rows[0] == ("one", "100 s", "2.50 GB + 1.00 GB GPU", *fast, *fast, "500 MB (dense 500)")
    assert rows[1] == ("two", "60 s", *("–",) * 6)
    assert len(rows) == 2
    assert cost_notes(records)[-1] == "two has no speed: out of memory."
    assert len(cost_table([record("one")])[0]) == 3
