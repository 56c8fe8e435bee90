"""SVD-LLM (arXiv 2403.07378) from top to bottom: Algorithm 1 up to the parameter update, in the order of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from svdllm.common.connected_processes import connected
from svdllm.common.errors import InputError
from svdllm.common.memory import give_back_freed
from svdllm.common.processes import is_first
from svdllm.common.progress import Reporter
from svdllm.common.run_options import RunOptions
from svdllm.compression.allocate import allocate, measure_times
from svdllm.compression.analyze import analyze, open_analysis
from svdllm.compression.inputs import calibration_windows, check_weights
from svdllm.compression.recipe import Recipe
from svdllm.compression.records import CompressionResult
from svdllm.compression.sequential import refit
from svdllm.compression.session import open_run, open_subject
from svdllm.compression.write import write


def compress(
    model: str | Path | PreTrainedModel, recipe: Recipe, output_dir: str | Path, **options: Any
) -> CompressionResult:
    """Compresses a model to one size; see ``compress_many`` for the options and errors."""
    if isinstance(recipe.ratio, tuple) and len(recipe.ratio) > 1:
        raise InputError("The recipe has several ratios: use compress_many, which makes a checkpoint of each.")
    return compress_many(model, recipe.single()[0], output_dir, **options)[0]


def compress_many(
    model: str | Path | PreTrainedModel,
    recipe: Recipe,
    output_dir: str | Path,
    *,
    calibration: str | Sequence[str] | Tensor | Any = None,
    tokenizer: Any = None,
    offline: bool = False,
    revision: str | None = None,
    resume: bool = True,
    hidden_states_limit: int | None = None,
    analysis_dir: str | Path | None = None,
    statistics_dir: str | Path | None = None,
    reporter: Reporter | None = None,
) -> list[CompressionResult]:
    """Compresses a model to every ratio of the recipe, with one calibration and one decomposition.

    The processes that torchrun or accelerate launch starts share the work. Each returns the result, which the first one
    has written and reports on. The bytes are the same for any number of processes.

    Args:
        model: hub id, folder, GGUF file, or a model in memory, which is left as it was.
        recipe: the settings. With several ratios, ``output_dir`` gets one folder for each.
        output_dir: made by this call; must not exist, or be empty. Work in progress lies beside it, in
            ``<output_dir>.partial`` (in a mount point, in ``svdllm.partial``), and a killed run goes on from there.
        calibration: strings, a ``datasets.Dataset`` or token ids (``windows x seqlen``), instead of the recipe's text.
        tokenizer: for a model in memory; other models bring theirs.
        offline: never ask the hub.
        revision: branch, tag or commit of a hub id.
        resume: go on with an unfinished run in ``<output_dir>.partial``; otherwise start over.
        hidden_states_limit: bytes of hidden states kept in RAM before they go to disk; by default half of what is free.
        analysis_dir: keeps the analysis for runs with other ratios and allocations, which then start from it.
        statistics_dir: keeps the Grams of the inputs for other recipes of the same method over the same tokens.
        reporter: is told about stages and progress.

    Raises:
        InputError: a setting, path or text is wrong, or another run is writing to the output; nothing is left behind.
        UnsupportedModelError: the model's structure is not understood; names the modules.
        ResourceError: the disk or the memory does not suffice. Finished blocks are kept.
        NumericalError: a NaN or infinity; names the tensor, or block and batch.
    """
    reporter = reporter if is_first() else None
    with (
        connected(recipe.device) as processes,
        open_run(
            model,
            recipe,
            output_dir,
            RunOptions.of(offline=offline, revision=revision, reporter=reporter),
            processes=processes,
            calibration=calibration,
            tokenizer=tokenizer,
            resume=resume,
            hidden_states_limit=hidden_states_limit,
            analysis_dir=analysis_dir,
            statistics_dir=statistics_dir,
        ) as run,
    ):
        subject, plans = open_subject(run)  # lines 1 and 6: the model, its blocks and the weights to compress
        windows = calibration_windows(run, subject)  # line 4: some text, as tokens
        provenance = check_weights(run, subject, windows)  # every weight is finite; hashes of weights and text
        with open_analysis(run, subject, provenance) as analysis:
            times = measure_times(run, subject)  # where time is the budget
            analyze(run, subject, windows, plans, analysis)  # lines 5 to 9, Algorithm 2: C = X X^T, spectra of W C W^T
            give_back_freed()
            plans = allocate(run, subject, windows, plans, analysis, times)  # a rank for every weight, or dense
        give_back_freed()
        fitted = [refit(run, subject, windows, analysis, plan) for plan in plans]  # sequential calibration only
        # lines 10 to 13: the factors of every weight take its place
        return [write(run, subject, provenance, analysis, plan, own) for plan, own in zip(plans, fitted, strict=True)]
