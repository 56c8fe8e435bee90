"""Losses window by window beside the dense model's, and times of one machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from svdllm.comparison.machines import machine_of, of_one_machine
from svdllm.comparison.paired import log_ratio, with_log_ratios
from svdllm.comparison.table import columns_of, groups_of


def record(variant: str | None, nll: list[float] | None, **more: Any) -> dict[str, Any]:
    row = {"perplexity": 2.0, "stderr": 0.1} | ({} if nll is None else {"window_nll": nll})
    sizes = {"params": 1e6, "weight_bytes": 1e6}
    ratio = None if variant is None else 0.2
    return {"variant": variant, "ratio": ratio, "status": "done", "perplexity": {"t.txt": row}, **sizes, **more}


def test_by_hand():
    """Differences 1, 2, 3: mean 2, standard deviation 1, its error over three windows 1 / sqrt(3)."""
    found = log_ratio([2.0, 5.0, 4.0], [1.0, 3.0, 1.0])
    assert found == pytest.approx((2.0, 3**-0.5))
    assert log_ratio([2.0], [1.5]) == (0.5, None)


def test_what_all_windows_have_in_common_cancels():
    text = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = log_ratio((100 * text + 0.25).tolist(), (100 * text).tolist())
    assert found == pytest.approx((0.25, 0.0), abs=1e-12)


def test_models_are_compared_with_the_dense_one_where_their_windows_are_its():
    records = [
        record(None, [1.0, 2.0]),
        record("svd-llm", [1.5, 3.5]),
        record("made-elsewhere", [1.5, 3.5], own_tokenizer=True),
        record("older", None),
        {"variant": "failed", "ratio": 0.2, "status": "failed", "error": {"type": "X", "message": "y"}},
    ]
    found = with_log_ratios(records)
    rows = [each.get("perplexity", {}).get("t.txt", {}) for each in found]
    assert [row.get("log_ratio") for row in rows] == [None, 1.0, None, None, None]
    assert rows[1]["log_ratio_stderr"] == pytest.approx(0.5)
    columns = columns_of(found)
    assert [column.heading for column in columns[:2]] == ["t.txt ↓", "t.txt, ln(ppl / dense) ↓"]
    dense, others = groups_of(found, columns)
    assert dense.rows[0].entries[1].text == "–"
    assert (others.rows[0].entries[1].text, others.rows[0].entries[1].stderr) == ("1.000", "± 0.500")


@pytest.mark.parametrize("first", [record("svd-llm", [1.0]), record(None, None)])
def test_without_the_dense_models_windows_there_is_no_column(first: dict[str, Any]):
    found = with_log_ratios([first, record("svd", [1.0])])
    assert [column.heading for column in columns_of(found)] == ["t.txt ↓"]


def test_times_are_of_the_machine_that_made_most():
    fast, slow = record("a", None, machine="fast"), record("b", None, machine="slow")
    assert of_one_machine([slow, fast, fast]) == ([fast, fast], "fast")
    assert of_one_machine([fast, fast]) == ([fast, fast], None)
    assert of_one_machine([record("a", None), record("a", None), fast])[1] == "one that older records do not name"
    assert machine_of("cpu").endswith(f", {torch.get_num_threads()} threads")
