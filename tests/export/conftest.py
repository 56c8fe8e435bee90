"""A small checkpoint, and the same in 8 and in 4 bits; no test changes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantized_models import RANKS, WIDTHS
from runs import run, save_dense, small_recipe
from svdllm.export.quantize import quantize


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("quantize") / "dense"
    return save_dense(folder, "qwen2", tokenizer=tokenizer, **WIDTHS)  # which has biases


@pytest.fixture(scope="session")
def checkpoint(dense: Path) -> Path:
    run(dense, dense.with_name("small"), recipe=small_recipe(ranks=RANKS))
    return dense.with_name("small")


@pytest.fixture(scope="session")
def in8(checkpoint: Path) -> Path:
    quantize(checkpoint, checkpoint.with_name("in8"), format="torchao")
    return checkpoint.with_name("in8")


@pytest.fixture(scope="session")
def in4(checkpoint: Path) -> Path:
    quantize(checkpoint, checkpoint.with_name("in4"), bits=4, format="torchao")
    return checkpoint.with_name("in4")
