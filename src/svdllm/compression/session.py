"""Opens a run: cheap checks, the output and its lock, resumption, and what is left when it fails."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from svdllm.checkpoint.output import (
    LOCK,
    PARTIAL,
    Output,
    claim_work_folder,
    followed,
    remove_scratch,
    require_ours,
)
from svdllm.common.device import resolve_device
from svdllm.common.disk import explain_full_disk
from svdllm.common.errors import ResourceError, SvdllmError
from svdllm.common.extras import require_extra
from svdllm.common.memory import explain_out_of_memory
from svdllm.common.processes import ALONE, Processes
from svdllm.common.progress import Reporter
from svdllm.common.run_options import RunOptions
from svdllm.common.settings_file import read_settings, refuse_other_settings
from svdllm.compression.forms import FORMS, in_bits
from svdllm.compression.plan import Plan, plan_each_ratio
from svdllm.compression.recipe import Recipe
from svdllm.compression.recipe_forms import IN_SOURCE_DTYPE
from svdllm.compression.room import require_room
from svdllm.compression.subject import Subject, discover_subject, read_weights
from svdllm.data import check_source
from svdllm.models.limits import context_length
from svdllm.models.open import Source, open_config


@dataclass(frozen=True, kw_only=True)
class Run:
    """An open run: what the caller asked for, and where its work lies."""

    model: str | Path | PreTrainedModel
    source: Source  # the model's config, and its weights where they need not be fetched
    recipe: Recipe
    calibration: Any  # where the text comes from: as in the recipe, or given from Python
    tokenizer: Any
    output: Output
    options: RunOptions
    resume: bool
    hidden_states_limit: int | None
    analysis_dir: Path | None  # of an analysis that is shared with other runs
    statistics_dir: Path | None  # of statistics that are shared with runs of other recipes
    processes: Processes

    @property
    def work(self) -> Path:
        """The folder of unfinished work."""
        return self.output.work

    @property
    def analysis_folder(self) -> Path:
        """The folder of the run's own analysis."""
        return self.work / "analysis"

    def spill_file(self, plan: Plan) -> Path | None:
        """The file of hidden states that do not fit into RAM; None where they do."""
        return self.work / f"hidden-states-{self.processes.rank}" if plan.needs.hidden_states_on_disk else None

    @property
    def inputs_folder(self) -> Path:
        """The folder of the inputs that this process keeps for a reverse walk."""
        return self.work / "inputs" / str(self.processes.rank)

    def scratch(self, plan: Plan) -> Path | None:
        """The folder of the weights of experts that do not fit into RAM; None where they do."""
        return self.work if plan.needs.experts_on_disk else None

    @property
    def reporter(self) -> Reporter:
        return self.options.reporter


@contextmanager
def open_run(
    model: str | Path | PreTrainedModel,
    recipe: Recipe,
    output_dir: str | Path,
    options: RunOptions,
    *,
    processes: Processes = ALONE,
    calibration: Any = None,
    tokenizer: Any = None,
    resume: bool = True,
    goes_on: bool = True,
    hidden_states_limit: int | None = None,
    analysis_dir: str | Path | None = None,
    statistics_dir: str | Path | None = None,
) -> Iterator[Run]:
    """Opens a run; the arguments are those of ``compress_many``, and the processes that share the run.

    No other run writes to the output while the context lasts. When it ends, the finished checkpoints appear under the
    name of the output. If the run fails, nothing is left behind, except finished blocks if disk or memory ran out.
    The first process alone locks, writes and cleans up.

    Raises:
        InputError: a setting, the model's path or the output is wrong.
        UnsupportedModelError: it is not a causal language model.
    """
    text = recipe.calibration if calibration is None else calibration
    recipe.require_budget()
    resolve_device(recipe.device)
    if recipe.needs_tokens:
        check_source(text)
    if any(in_bits(FORMS[name]) for name in recipe.analysed_forms):
        require_extra("compressed_tensors", "A model in few bits", extra="quantize", instead=IN_SOURCE_DTYPE)
    output = Output.at(output_dir)
    with (
        _taken(output, processes, options.reporter),
        _cleaning_up(output.work, recipe.batch_tokens, processes, goes_on),
    ):
        with options.reporter.stage("open", 1):
            source = open_config(model, offline=options.offline, revision=options.revision)
        run = Run(
            model=model,
            source=source,
            recipe=_settled(recipe, source, calibration, options.reporter),
            calibration=text,
            tokenizer=tokenizer,
            output=output,
            options=options,
            resume=resume,
            hidden_states_limit=hidden_states_limit,
            analysis_dir=None if analysis_dir is None else followed(Path(analysis_dir)),
            statistics_dir=None if statistics_dir is None else followed(Path(statistics_dir)),
            processes=processes,
        )
        _refuse_other_recipe(run)
        yield run
        if processes.is_first:
            output.complete()


@contextmanager
def _taken(output: Output, processes: Processes, reporter: Reporter) -> Iterator[None]:
    """Locks the output while the context lasts, once it is known to be free."""
    with output.taken() if processes.is_first else nullcontext() as warning:
        if warning is not None:
            reporter.warn(warning)
        if processes.is_first:
            require_ours(output.work)
            output.finish_completing()
            output.require_free(LOCK, PARTIAL)
        processes.wait()
        yield


def open_subject(run: Run) -> tuple[Subject, list[Plan]]:
    """Opens the model and plans every checkpoint of the run.

    Weights are fetched or dequantised only when the plan has found room for the run.

    Raises:
        InputError: the model is compressed already, a pattern matches nothing, or the budget cannot be met.
        UnsupportedModelError: the model's structure is not understood; names the modules.
        ResourceError: disk or memory do not suffice.
    """
    with run.reporter.stage("plan", 1):
        subject = discover_subject(run.source, run.recipe)
        plans = plan_each_ratio(subject, run.recipe, run.hidden_states_limit, run.processes.count)
        if run.processes.is_first:
            require_room(run.output, max(plans, key=lambda plan: plan.needs.disk_bytes))
            claim_work_folder(run.work)
        run.processes.wait()
    run.processes.require_shared(run.work)
    if run.source.weights is None:
        found = subject
        with run.reporter.stage("open", 1):
            subject = run.processes.first_then_others(
                lambda: read_weights(found, run.model, run.options, run.work / "source")
            )
            plans = plan_each_ratio(subject, run.recipe, run.hidden_states_limit, run.processes.count)
    return subject, plans


def recipe_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a recipe by the names that they have among the settings of a run."""
    return {f"recipe: {key}": value for key, value in settings.items()}


def _settled(recipe: Recipe, source: Source, calibration: Any, reporter: Reporter) -> Recipe:
    """The recipe as it is recorded: with the name of the text, and with windows that the model can take."""
    if calibration is not None:
        named = calibration if isinstance(calibration, str) else f"given from Python ({type(calibration).__name__})"
        recipe = recipe.model_copy(update={"calibration": named})
    if not recipe.needs_tokens:
        return recipe
    bounded = recipe.within(context_length(source.config))
    if bounded.seqlen < recipe.seqlen:
        reporter.note(f"Calibration windows have {bounded.seqlen} tokens: the model takes no more.")
    return bounded


def _refuse_other_recipe(run: Run) -> None:
    """Raises InputError if unfinished work at the place of the output was begun with another recipe."""
    if run.resume and (found := read_settings(run.analysis_folder)):
        wanted = recipe_settings(run.recipe.to_dict())
        refuse_other_settings({key: found.get(key) for key in wanted}, wanted, run.work)


@contextmanager
def _cleaning_up(work: Path, batch_tokens: int, processes: Processes, goes_on: bool) -> Iterator[None]:
    """Leaves nothing behind when a run fails, unless there is work worth going on with."""
    new = not work.exists()
    memory, disk = _advice(batch_tokens) if goes_on else _advice_from_the_start(batch_tokens)
    try:
        with explain_out_of_memory(memory), explain_full_disk(work, disk):
            yield
    except SvdllmError as error:
        processes.stopped(error)
        if not processes.is_first:
            raise
        finished = any(work.glob("**/block-*.safetensors"))
        if new and not (finished and isinstance(error, ResourceError)):
            shutil.rmtree(work, ignore_errors=True)
        elif isinstance(error, ResourceError):
            remove_scratch(work)
        raise


def _advice(batch_tokens: int) -> tuple[str, str]:
    """What to do when memory, and when the disk, did not suffice for a run that keeps finished blocks."""
    kept = "Finished blocks are kept: the same command goes on with them"
    return (
        f"{kept} when there is more memory. To start over with less, use --no-resume and lower --batch-tokens (now "
        f"{batch_tokens}) or --samples; `svdllm plan` tells what a run needs.",
        f"{kept}.",
    )


def _advice_from_the_start(batch_tokens: int) -> tuple[str, str]:
    """The same for a run that keeps nothing."""
    nothing = "Nothing is kept, and the same command begins anew."
    return f"{nothing} Lower --batch-tokens (now {batch_tokens}), --samples or --seqlen to need less.", nothing
