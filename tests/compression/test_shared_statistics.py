"""Statistics that a run leaves for runs of other recipes over the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runs import digests, run, small_recipe, token_windows
from svdllm.compression import analyze

TWO_SIDED = {"metric": "two-sided", "shrinkage": 0.1, "gradient_samples": 4}


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks whose statistics were collected from tokens."""
    blocks: list[int] = []
    collect = analyze.collect_statistics

    def counted(block: Any, *args: Any) -> Any:
        blocks.append(block.index)
        return collect(block, *args)

    monkeypatch.setattr(analyze, "collect_statistics", counted)
    return blocks


@pytest.mark.parametrize(("first", "second"), [(TWO_SIDED, {}), ({}, TWO_SIDED)])
def test_another_recipe_is_calibrated_by_them_alike(
    first: dict[str, Any], second: dict[str, Any], dense: Path, tmp_path: Path, collected: list[int]
) -> None:
    shared = tmp_path / "statistics"
    run(dense, tmp_path / "first", recipe=small_recipe(**first), statistics_dir=shared)
    assert collected == [0, 1]
    found = run(dense, tmp_path / "found", recipe=small_recipe(**second), statistics_dir=shared)
    assert collected == [0, 1]
    alone = run(dense, tmp_path / "alone", recipe=small_recipe(**second))
    assert digests(found.output_dir) == digests(alone.output_dir)


@pytest.mark.parametrize(
    ("settings", "seed"), [({}, 1), ({"batch_tokens": 32}, 0), ({"dtype": "float64"}, 0), ({"method": "asvd"}, 0)]
)
def test_those_of_other_tokens_or_sums_are_not_taken(
    settings: dict[str, Any], seed: int, dense: Path, tmp_path: Path, collected: list[int]
) -> None:
    run(dense, tmp_path / "first", statistics_dir=tmp_path / "statistics")
    ids = token_windows(seed=seed)
    run(dense, tmp_path / "other", ids=ids, recipe=small_recipe(**settings), statistics_dir=tmp_path / "statistics")
    assert collected == [0, 1, 0, 1]
