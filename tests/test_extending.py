"""The examples of docs/extending.md run, in the order of the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from runs import save_dense
from svdllm.comparison.variants import VARIANTS
from svdllm.compression.math.metrics import METHODS
from svdllm.compression.ranks import ALLOCATIONS
from svdllm.recovery.methods import METHODS as RECOVERY_METHODS
from test_docs import ROOT, fenced

TABLES = (METHODS, ALLOCATIONS, RECOVERY_METHODS, VARIANTS)


@pytest.fixture
def tables_as_they_were() -> Iterator[None]:
    """Removes the rows that the page adds."""
    before = [dict(table) for table in TABLES]
    yield
    for table, rows in zip(TABLES, before, strict=True):
        table.clear()
        table.update(rows)


@pytest.mark.usefixtures("tables_as_they_were")
def test_the_examples_of_the_page_run(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_dense(tmp_path / "MODEL", tokenizer=tokenizer)
    Path("text.txt").write_text("A rank for every linear, or dense. " * 200, encoding="utf-8")
    page = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    blocks = fenced(page, "python")
    assert blocks
    names: dict[str, object] = {"__name__": "extending"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"extending.md, block {number}", "exec"), names)
