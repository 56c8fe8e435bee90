"""Prunes a model: the published methods that remove heads, neurons, branches or directions of the residual.

They are here to be compared with. ``svdllm compress`` is the method of this library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from svdllm.checkpoint.output import FINISHED, claim_work_folder, start_over
from svdllm.common.device import resolve_device
from svdllm.common.memory import device_peak_bytes, peak_bytes
from svdllm.common.progress import Reporter
from svdllm.common.run_options import RunOptions
from svdllm.compression.inputs import calibration_windows, check_weights
from svdllm.compression.session import Run, open_run
from svdllm.compression.subject import discover_subject, read_weights
from svdllm.pruning.job import Job
from svdllm.pruning.methods import METHODS, recipe_of
from svdllm.pruning.settings import Pruning
from svdllm.pruning.write import Sizes, write


@dataclass(frozen=True, kw_only=True)
class PruningResult:
    """The result of a run: the checkpoint's folder, its sizes, and the memory (bytes) and time (seconds) it took."""

    output_dir: Path
    settings: Pruning
    sizes: Sizes
    seconds: dict[str, float]
    peak_ram_bytes: int
    peak_device_bytes: int
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {
            "output_dir": str(self.output_dir),
            "method": self.settings.pruning,
            "ratio": self.settings.ratio,
            **asdict(self.sizes),
            "seconds": self.seconds,
            "peak_ram_bytes": self.peak_ram_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "warnings": self.warnings,
            "settings": self.settings.to_dict(),
        }


def prune(
    model: str | Path | PreTrainedModel,
    settings: Pruning,
    output_dir: str | Path,
    *,
    calibration: str | Sequence[str] | Tensor | Any = None,
    tokenizer: Any = None,
    offline: bool = False,
    revision: str | None = None,
    reporter: Reporter | None = None,
) -> PruningResult:
    """Prunes a model to a ratio and writes a checkpoint that ``from_pretrained`` loads.

    A run that fails or is killed leaves nothing to go on with.

    Args:
        model: hub id, folder, GGUF file, or a model in memory, which is left as it was.
        output_dir: made by this call; must not exist, or be empty.
        calibration, tokenizer: as of ``compress``.
        offline: never ask the hub.
        revision: branch, tag or commit of a hub id.
        reporter: is told about stages and progress.

    Raises:
        InputError: a setting, path or text is wrong, or the ratio would remove every head; nothing is left behind.
        UnsupportedModelError: the method cannot prune this model; says why.
        ResourceError: the disk or the memory does not suffice.
        NumericalError: a NaN or infinity; names the tensor, or block and batch.
    """
    method = METHODS[settings.pruning]
    recipe = recipe_of(settings)
    options = RunOptions.of(offline=offline, revision=revision, reporter=reporter)
    with open_run(
        model, recipe, output_dir, options, calibration=calibration, tokenizer=tokenizer, resume=False, goes_on=False
    ) as run:
        job = _job(run, settings)
        windows = calibration_windows(run, job.subject)
        assert windows is not None
        provenance = check_weights(run, job.subject, windows)
        made = method.prune(job, windows.ids)
        with run.reporter.stage("write", 1):
            sizes = write(run.work / FINISHED, run, job, made, provenance)
    return PruningResult(
        output_dir=run.output.path,
        settings=settings,
        sizes=sizes,
        seconds=dict(run.reporter.seconds),
        peak_ram_bytes=peak_bytes(),
        peak_device_bytes=device_peak_bytes(resolve_device(recipe.device)),
        warnings=list(run.reporter.warnings),
    )


def _job(run: Run, settings: Pruning) -> Job:
    """Opens the model, checks that it can be pruned, and fetches its weights."""
    with run.reporter.stage("plan", 1):
        job = Job(discover_subject(run.source, run.recipe), settings, run.recipe, run.work, run.reporter)
        METHODS[settings.pruning].check(job)
    start_over(run.work)
    claim_work_folder(run.work)
    if run.source.weights is not None:
        return job
    with run.reporter.stage("open", 1):
        return replace(job, subject=read_weights(job.subject, run.model, run.options, run.work / "source"))
