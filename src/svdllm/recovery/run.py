"""A recovery from beginning to end: check, train stage by stage, write the same kind of checkpoint again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from svdllm.checkpoint.output import FINISHED, LOCK, PARTIAL, Output, require_ours
from svdllm.checkpoint.report import read_report
from svdllm.common.disk import explain_full_disk
from svdllm.common.errors import NumericalError, SvdllmError
from svdllm.common.memory import explain_out_of_memory, peak_bytes
from svdllm.common.processes import is_first
from svdllm.common.progress import Reporter
from svdllm.data import evaluation_tokens
from svdllm.evaluation.perplexity import perplexity
from svdllm.models.limits import context_length, within_context
from svdllm.models.open import open_config
from svdllm.models.safetensors_files import weight_files
from svdllm.recovery.checks import check_cheaply, check_memory, check_tokens, training_dtype
from svdllm.recovery.distributed import meet, own_device, wait_for_all
from svdllm.recovery.methods import METHODS
from svdllm.recovery.models import Models
from svdllm.recovery.result import Measured, RecoveryResult
from svdllm.recovery.settings import Recovery
from svdllm.recovery.stage import Stage, Task
from svdllm.recovery.training_data import TrainingData
from svdllm.recovery.work_folder import WorkFolder, deciding_settings
from svdllm.recovery.write import write_trained

PPL_SEQLEN = 512


def recover(
    folder: str | Path,
    output_dir: str | Path,
    settings: Recovery,
    *,
    ppl: Sequence[str] = (),
    ppl_seqlen: int | None = None,
    ppl_windows: int | None = 16,
    log_dir: str | Path | None = None,
    offline: bool = False,
    resume: bool = True,
    reporter: Reporter | None = None,
) -> RecoveryResult:
    """Trains a compressed model and writes a checkpoint of the same ranks and format.

    Args:
        folder: a checkpoint that ``compress`` wrote (or another recovery).
        output_dir: made by this call; must not exist, or be empty. Work in progress lies beside it, in
            ``<output_dir>.partial`` (in a mount point, in ``svdllm.partial``), and a killed run goes on from there.
        settings: the methods, their data and schedules.
        ppl: texts on which perplexity is measured before and after, and of the teacher if there is one.
        ppl_seqlen: tokens of a window of these texts; 512, or the model's context if that is shorter.
        ppl_windows: number of windows of each text; None for all.
        log_dir: where TensorBoard logs are written, a folder in it for each stage.
        offline: never ask the hub.
        resume: go on with an unfinished run in ``<output_dir>.partial``; otherwise start over.
        reporter: is told about stages and progress.

    Raises:
        InputError: a setting, path or text is wrong, or another run is writing to the output; nothing is left behind.
        ResourceError: the disk or the memory does not suffice; says what to do.
        NumericalError: the loss or a gradient is not finite; names step and layer. The last saved step is kept.
    """
    output = Output.at(output_dir)
    reporter = reporter if reporter is not None and is_first() else Reporter()
    models = Models(
        folder=Path(folder),
        teacher=settings.teacher,
        work=output.work,
        device=own_device(settings.device),
        offline=offline,
        reporter=reporter,
    )
    log_dir = None if log_dir is None else Path(log_dir)
    read_report(models.folder)  # refuses a folder that is not a checkpoint
    settings = settings.within(context_length(models.config))
    ppl_seqlen = ppl_seqlen or within_context(models.config, PPL_SEQLEN)
    run = _Run(models, output, settings, tuple(ppl), ppl_seqlen, ppl_windows, log_dir, resume, reporter)
    with run.alone():
        check_cheaply(models, settings, ppl, ppl_seqlen, log_dir)
        with run.explaining():
            return run.execute()


@dataclass(frozen=True)
class _Run:
    """One recovery, in the order in which it happens."""

    models: Models
    output: Output
    settings: Recovery
    ppl: tuple[str, ...]
    ppl_seqlen: int
    ppl_windows: int | None
    log_dir: Path | None
    resume: bool
    reporter: Reporter

    @property
    def work(self) -> WorkFolder:
        return WorkFolder(self.models.work)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other runs from the output. The first process does so for all processes of this run."""
        if not is_first():
            yield
            return
        with self.output.taken() as warning:
            if warning is not None:
                self.reporter.warn(warning)
            require_ours(self.work.path)
            self.output.finish_completing()
            self.output.require_free(LOCK, PARTIAL)
            yield

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Removes the work folder of a run that fails before anything was learnt, and says what to do about memory."""
        new = not self.work.path.exists()
        advice = (
            "The last saved step is kept: lower --micro-batch or use --gradient-checkpointing, and it goes on. Or "
            "lower --seqlen or --batch, and start over with --no-resume."
        )
        full = "The last saved step is kept: the same command goes on from there."
        try:
            with explain_out_of_memory(advice), explain_full_disk(self.work.path, full):
                yield
        except NumericalError:
            raise
        except SvdllmError:
            if new and is_first() and not self.work.holds_progress():
                shutil.rmtree(self.work.path, ignore_errors=True)
            raise

    def execute(self) -> RecoveryResult:
        meet(self.models.device)
        tokenizer, texts = self._open()
        examples: dict[str, Any] = {}
        stages = list(self._stages(tokenizer, examples))
        tasks = [task for _, _, task in stages]
        check_tokens(self.models, tokenizer, texts.values(), tasks)
        check_memory(self.models, self._needed_memory(stages))
        self._require_disk()
        if self.work.open(deciding_settings(self.settings, tasks, self.models), resume=self.resume):
            self.reporter.note(f"Going on with {self.work.path}.")
        measured: Measured = {text: {} for text in texts}
        self._measure("before", measured, texts)
        if self.settings.teacher is not None:
            self._measure("teacher", measured, texts)
        records = [self.work.once(stage, task, self.models) for _, stage, task in stages]
        self._measure("after", measured, texts)
        result = RecoveryResult(
            output_dir=self.output.path,
            settings=self.settings,
            stages=records,
            examples=examples,
            perplexity=measured,
            seconds=self.reporter.seconds,
            peak_ram_bytes=peak_bytes(),
            warnings=self.reporter.warnings,
        )
        if is_first():
            write_trained(self.work.path / FINISHED, self.models, result.history())
            self.output.complete()
        wait_for_all()
        return result

    def _open(self) -> tuple[Any, dict[str, Tensor]]:
        """The tokenizer, and the token ids of the texts to measure."""
        offline = self.models.offline
        with self.reporter.stage("open", 1):
            tokenizer = open_config(self.models.folder, offline=offline).load_tokenizer(offline)
            return tokenizer, {text: evaluation_tokens(text, tokenizer, offline=offline) for text in self.ppl}

    def _stages(self, tokenizer: Any, examples: dict[str, Any]) -> Iterator[tuple[str, Stage, Task]]:
        """Method, stage and task of everything that is trained; adds a description of the data to ``examples``."""
        for number, name in enumerate(self.settings.methods):
            method, schedule = METHODS[name], self.settings.schedule(name)
            data = TrainingData(
                settings=self.settings,
                schedule=schedule,
                tokenizer=tokenizer,
                offline=self.models.offline,
                reporter=self.reporter,
            )
            rows, examples[name] = method.lesson(data)
            held_out = method.held_out(data)
            for stage in method.stages(self.settings):
                file = f"{number}-{stage.file}"
                task = Task(
                    file=file,
                    title=stage.title,
                    rows=rows,
                    held_out=held_out,
                    settings=self.settings,
                    schedule=schedule,
                    dtype=training_dtype(self.models, self.settings),
                    folder=self.work.path / file,
                    log_dir=self.log_dir,
                    reporter=self.reporter,
                )
                yield name, stage, task

    def _needed_memory(self, stages: Sequence[tuple[str, Stage, Task]]) -> dict[str, int]:
        """The bytes that each method needs at the least."""
        return {name: METHODS[name].least_bytes(task, self.models) for name, _, task in stages}

    def _require_disk(self) -> None:
        if is_first():
            written = sum(file.stat().st_size for file in weight_files(self.models.folder))
            self.output.require_disk(written, "the checkpoint needs")

    def _measure(self, name: str, measured: Measured, texts: dict[str, Tensor]) -> None:
        if not texts:
            return
        model = self.models.dense() if name == "teacher" else self.models.compressed(untrained=name == "before")
        for text, ids in texts.items():
            with self.reporter.stage(f"eval {name}", 1):
                measured[text][name] = perplexity(
                    model,
                    ids,
                    seqlen=self.ppl_seqlen,
                    max_windows=self.ppl_windows,
                    progress=self.reporter.advance,
                    source=text,
                )
