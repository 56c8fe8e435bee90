"""The inputs of a run: its calibration text as windows of tokens, and weights without NaN or infinities."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from svdllm.common.errors import InputError
from svdllm.common.run_options import RunOptions
from svdllm.compression.plan_warnings import calibration_warnings
from svdllm.compression.recipe import Recipe
from svdllm.compression.records import Provenance
from svdllm.compression.session import Run
from svdllm.compression.subject import Subject
from svdllm.data import TokenWindows
from svdllm.data import calibration_windows as windows_of
from svdllm.models.batches import require_batches, windows_per_batch
from svdllm.models.limits import require_known_ids
from svdllm.models.open import Source
from svdllm.models.weights import survey


def calibration_windows(run: Run, subject: Subject) -> TokenWindows | None:
    """Algorithm 1, line 4: some text, as windows of tokens (``samples x seqlen``). None where nothing needs data.

    Raises:
        InputError: the text, the tokenizer or a token is missing or wrong.
    """
    recipe = run.recipe
    if not recipe.needs_tokens:
        return None
    with run.reporter.stage("tokenise", 1):
        tokenizer = run.tokenizer
        if tokenizer is None and not isinstance(run.calibration, Tensor):
            if subject.source.folder is None:
                raise InputError(
                    "A model in memory needs its tokenizer (tokenizer=...), or token ids (calibration=...)."
                )
            tokenizer = subject.source.load_tokenizer(run.options.offline)
        windows = read_windows(run.calibration, tokenizer, recipe, subject.source, run.options)
    require_batches(_num_batches(windows.ids, recipe), run.processes.count)
    for warning in calibration_warnings(subject, recipe, windows.num_tokens):
        run.reporter.warn(warning)
    return windows


def _num_batches(ids: Tensor, recipe: Recipe) -> int:
    """Batches of the shortest text that processes share."""
    windows = recipe.sequential_samples if recipe.calibration_mode == "sequential" else recipe.samples
    return -(-min(windows, len(ids)) // windows_per_batch(recipe.batch_tokens, ids.shape[1]))


def read_windows(calibration: Any, tokenizer: Any, recipe: Recipe, source: Source, options: RunOptions) -> TokenWindows:
    """A text as the windows that a recipe asks for, of tokens that the model has.

    Raises:
        InputError: the text or a token is wrong.
    """
    windows = windows_of(
        calibration,
        tokenizer,
        samples=recipe.samples,
        seqlen=recipe.seqlen,
        seed=recipe.seed,
        offline=options.offline,
    )
    require_known_ids(windows.ids, source.config, tokenizer)
    return windows


def check_weights(run: Run, subject: Subject, windows: TokenWindows | None) -> Provenance:
    """Reads every weight once, and tells where model and text of the run come from.

    Raises:
        NumericalError: a weight is NaN or infinite; names the tensor.
    """
    source = subject.source
    with run.reporter.stage("check weights", len(subject.weights.names())):
        fingerprint = run.processes.from_first(lambda: survey(subject.weights, subject.buffers, run.reporter.advance))
    return Provenance.of(source.name, source.revision, fingerprint, windows)
