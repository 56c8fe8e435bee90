"""Methods of pruning as rows of a comparison: made, measured, resumed, trained, and failing by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runs import TEXT, save_dense
from svdllm.common.errors import InputError
from svdllm.common.run_options import RunOptions
from svdllm.comparison import Grid, Measures, run_grid, variants_of
from svdllm.comparison.target_sizes import ratios_of_sizes

METHODS = ["flap", "llm-pruner", "slicegpt", "blockpruner", "svd-llm"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    save_dense(folder / "dense", tokenizer=tokenizer, num_hidden_layers=4)
    (folder / "text.txt").write_text(TEXT)
    return folder


def make_grid(
    place: Path, methods: list[str], ratios: tuple[float, ...], recover: dict[str, Any] | None = None, samples: int = 8
) -> Grid:
    text = str(place / "text.txt")
    calibration = {"calibration": text, "samples": samples, "seqlen": 16, "seed": 1}
    return Grid(
        model=str(place / "dense"),
        variants=variants_of(methods, calibration, recover, teacher=str(place / "dense")),
        ratios=ratios,
        measures=Measures(texts=(text,), seqlen=16, windows=6, prompts=()),
        title="Pruning",
    )


def test_methods_of_pruning_are_rows_of_a_comparison(place: Path, tmp_path: Path) -> None:
    records = run_grid(make_grid(place, METHODS, (0.25,)), tmp_path / "r", keep=True)
    assert [record["name"] for record in records] == ["dense", *(f"{name} 0.25" for name in METHODS)]
    assert [record.get("error") for record in records] == [None] * 6
    dense = records[0]["params"]
    for record in records[1:]:
        assert record["achieved_ratio"] >= 0.24
        assert record["params"] < dense
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "r/cells").iterdir()}
    again = run_grid(make_grid(place, [*METHODS, "svd"], (0.25,)), tmp_path / "r", keep=True)
    assert len(again) == 7
    assert stamps.items() <= {file: file.stat().st_mtime_ns for file in (tmp_path / "r/cells").iterdir()}.items()
    with pytest.raises(InputError, match="made with other settings"):
        run_grid(make_grid(place, METHODS, (0.25,), samples=6), tmp_path / "r", keep=True)


def test_a_ratio_that_a_method_cannot_reach_fails_alone(place: Path, tmp_path: Path) -> None:
    records = run_grid(make_grid(place, ["flap", "llm-pruner"], (0.6,)), tmp_path / "r")
    assert [record["status"] for record in records] == ["done", "done", "failed"]
    assert records[2]["error"]["exit_code"] == 2
    assert "would remove every head" in records[2]["error"]["message"]


def test_a_pruned_model_is_trained_afterwards(place: Path, tmp_path: Path) -> None:
    training = {"data": str(place / "text.txt"), "steps": 2, "batch": 2, "seqlen": 16}
    records = run_grid(make_grid(place, ["llm-pruner+distill", "flap"], (0.25,), training), tmp_path / "r")
    assert [record.get("error") for record in records] == [None] * 3
    assert records[1]["recovery"][0]["settings"]["methods"] == ["distill"]
    assert records[1]["params"] < records[0]["params"]


def test_target_sizes_are_ratios_of_the_same_bytes(place: Path, tmp_path: Path) -> None:
    dense = (place / "dense/model.safetensors").stat().st_size
    options = RunOptions()
    ratios = ratios_of_sizes(str(place / "dense"), [int(0.9 * dense), int(0.8 * dense)], options)
    (_, record) = run_grid(make_grid(place, ["flap"], ratios[1:]), tmp_path / "r")
    assert record["file_bytes"] == pytest.approx(0.8 * dense, rel=0.02)
    for size in (dense, 10_000):
        with pytest.raises(InputError, match="--target-size: expected a size between"):
            ratios_of_sizes(str(place / "dense"), [size], options)
