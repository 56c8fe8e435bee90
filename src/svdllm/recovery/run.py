"""A recovery from beginning to end: check, train stage by stage, write the same kind of checkpoint again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from svdllm.checkpoint.finish import RECIPE_FILE, copy_companions, finish_checkpoint
from svdllm.checkpoint.output import FINISHED, LOCK, PARTIAL, Output, claim_work_folder, require_ours
from svdllm.checkpoint.report import read_report
from svdllm.checkpoint.shards import write_shards
from svdllm.common.disk import explain_full_disk
from svdllm.common.errors import NumericalError, SvdllmError
from svdllm.common.files import save_atomically, write_atomically
from svdllm.common.memory import explain_out_of_memory, peak_bytes
from svdllm.common.progress import Reporter
from svdllm.common.settings_file import FINGERPRINT_FILE, read_settings, refuse_other_settings
from svdllm.common.version import __version__
from svdllm.compression.recipe import load_settings, make_recipe
from svdllm.data import evaluation_tokens
from svdllm.evaluation.perplexity import perplexity
from svdllm.models.limits import context_length, within_context
from svdllm.models.low_rank.lowrank import sha256_of
from svdllm.models.open import open_config
from svdllm.models.safetensors_files import weight_files
from svdllm.recovery.blockwise import train_blocks
from svdllm.recovery.checks import check_cheaply, check_memory, check_tokens, training_dtype
from svdllm.recovery.distributed import is_main, meet, num_processes, own_device, wait_for_all
from svdllm.recovery.models import Models
from svdllm.recovery.record import Measured, RecoveryResult, TrainingRecord
from svdllm.recovery.settings import OF_MEMORY, ORDERS, Recovery
from svdllm.recovery.stage import Rows, Task
from svdllm.recovery.training_data import held_out_rows, training_rows

PPL_SEQLEN = 512
SETTINGS_FOLDER = "analysis"  # of a work folder: what decides its content
Trained = tuple[TrainingRecord, dict[str, Tensor] | None]  # the tensors are None where files of them were written
Stage = Callable[[Task], Trained]


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
    """Trains what compression left over of a model, and writes a checkpoint of the same ranks and format.

    Args:
        folder: a checkpoint that ``compress`` wrote (or another recovery).
        output_dir: made by this call; must not exist, or be empty. Work in progress lies beside it, in
            ``<output_dir>.partial`` (in a mount point, in ``svdllm.partial``), and a killed run goes on from there.
        settings: what is trained, how, and on what.
        ppl: texts on which perplexity is measured before and after, and of the teacher if there is one.
        ppl_seqlen, ppl_windows: windows of these texts; 512 tokens by default, or the model's context if it is shorter.
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
    reporter = reporter if reporter is not None and is_main() else Reporter()
    models = Models(
        folder=Path(folder),
        teacher=settings.teacher,
        work=output.work,
        device=own_device(settings.device),
        offline=offline,
        reporter=reporter,
    )
    log_dir = None if log_dir is None else Path(log_dir)
    read_report(models.folder)  # refuses what is no checkpoint
    settings = settings.within(context_length(models.config))
    ppl_seqlen = ppl_seqlen or within_context(models.config, PPL_SEQLEN)
    run = _Run(models, output, settings, tuple(ppl), ppl_seqlen, ppl_windows, log_dir, resume, reporter)
    with run.alone():
        check_cheaply(models, settings, ppl, ppl_seqlen, log_dir)
        with run.explaining():
            return run.execute()


@dataclass
class _Run:
    """One recovery. What a finished stage changed is a file of tensors in the work folder."""

    models: Models
    output: Output
    settings: Recovery
    ppl: tuple[str, ...]
    ppl_seqlen: int
    ppl_windows: int | None
    log_dir: Path | None
    resume: bool
    reporter: Reporter
    examples: dict[str, Any] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        return self.models.work

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other runs from the output. The first process does so for all processes of this run."""
        if not is_main():
            yield
            return
        with self.output.taken() as warning:
            if warning is not None:
                self.reporter.warn(warning)
            require_ours(self.work)
            self.output.finish_completing()
            self.output.require_free(LOCK, PARTIAL)
            yield

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """A run that fails before anything was learnt leaves nothing; memory that is short is said with a way out."""
        new = not self.work.exists()
        advice = (
            "The last saved step is kept: lower --micro-batch or use --gradient-checkpointing, and it goes on. Or lower "
            "--seqlen, for blockwise also --batch, and start over with --no-resume."
        )
        full = "The last saved step is kept: the same command goes on from there."
        try:
            with explain_out_of_memory(advice), explain_full_disk(self.work, full):
                yield
        except NumericalError:
            raise
        except SvdllmError:
            if new and is_main() and not self._has_learnt():
                shutil.rmtree(self.work, ignore_errors=True)
            raise

    def _has_learnt(self) -> bool:
        kept = ("*.safetensors", "*/checkpoint-*/trainer_state.json", "*/block-*.safetensors")
        return any(True for pattern in kept for _ in self.work.glob(pattern))

    def execute(self) -> RecoveryResult:
        meet(self.models.device)
        offline = self.models.offline
        with self.reporter.stage("open", 1):
            tokenizer = open_config(self.models.folder, offline=offline).load_tokenizer(offline)
            texts = {text: evaluation_tokens(text, tokenizer, offline=offline) for text in self.ppl}
        stages = list(self._stages(tokenizer))
        check_tokens(self.models, tokenizer, texts.values(), [task for task, _ in stages])
        check_memory(self.models, [task for task, _ in stages])
        if is_main():
            written = sum(file.stat().st_size for file in weight_files(self.models.folder))
            self.output.require_disk(written, "the checkpoint needs")
        self._open_work_folder([task for task, _ in stages])
        measured: Measured = {text: {} for text in texts}
        self._measure("before", measured, texts)
        if self.settings.teacher is not None:
            self._measure("teacher", measured, texts)
        records = [self._once(task, stage) for task, stage in stages]
        self._measure("after", measured, texts)
        result = RecoveryResult(
            output_dir=self.output.path,
            settings=self.settings,
            stages=records,
            examples=self.examples,
            perplexity=measured,
            seconds=self.reporter.seconds,
            peak_ram_bytes=peak_bytes(),
            warnings=self.reporter.warnings,
        )
        if is_main():
            self._write(result)
        wait_for_all()
        return result

    def _open_work_folder(self, tasks: Sequence[Task]) -> None:
        """Makes it, or takes up that of an earlier run with the same settings."""
        settings = self.settings.model_dump(mode="json", exclude=set(OF_MEMORY))
        decides = {
            **{f"recovery: {key}": value for key, value in settings.items()},
            **{f"rows of {task.title}": task.fingerprint for task in tasks},
            "weights of the checkpoint": [sha256_of(path) for path in weight_files(self.models.folder)],
            "config of the checkpoint": sha256_of(self.models.folder / "config.json"),
            "teacher": self.models.teacher_fingerprint(),
            "processes": num_processes(),
            "svdllm version": __version__,
            "torch version": torch.__version__,
            "transformers version": transformers.__version__,
        }
        if not self.resume and is_main():
            shutil.rmtree(self.work, ignore_errors=True)
        wait_for_all()
        if found := read_settings(self.work / SETTINGS_FOLDER):
            refuse_other_settings(found, decides, self.work)
            self.reporter.note(f"Going on with {self.work}.")
        elif is_main():
            claim_work_folder(self.work)
            (self.work / SETTINGS_FOLDER).mkdir(exist_ok=True)
            write_atomically(self.work / SETTINGS_FOLDER / FINGERPRINT_FILE, json.dumps(decides, indent=2).encode())

    def _stages(self, tokenizer: Any) -> Iterator[tuple[Task, Stage]]:
        """What is run, in order, and by which function."""
        given = (self.settings, tokenizer, self.models.offline, self.reporter)
        for number, method in enumerate(self.settings.methods):
            rows, self.examples[method] = training_rows(method, *given)
            task = partial(self._task, method, rows=rows, held_out=held_out_rows(method, *given))
            if method == "sequential-lora":
                for step, factors in enumerate(ORDERS[self.settings.order]):
                    file = f"{number}-{step}-lora-{'-'.join(factors)}"
                    yield task(f"lora {' and '.join(factors)}", file), partial(self._lora, factors)
            else:
                yield task(method, f"{number}-{method}"), self._distill if method == "distill" else self._blockwise

    def _task(self, method: str, title: str, file: str, rows: Rows, held_out: Rows) -> Task:
        return Task(
            file=file,
            title=title,
            method=method,
            rows=rows,
            held_out=held_out,
            settings=self.settings,
            folder=self.work / file,
            log_dir=self.log_dir,
            reporter=self.reporter,
        )

    def _once(self, task: Task, stage: Stage) -> TrainingRecord:
        """A stage, or what an earlier run made of it; its record is written when all else is."""
        record = self.work / f"{task.file}.json"
        if record.is_file():
            return TrainingRecord(**json.loads(record.read_text(encoding="utf-8")))
        done, changed = stage(task)
        if is_main():
            if changed is not None:
                save_atomically(changed, self.work / f"{task.file}.safetensors")
            write_atomically(record, json.dumps(asdict(done)).encode())
            for checkpoint in task.folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        wait_for_all()
        return done

    def _lora(self, factors: tuple[str, ...], task: Task) -> Trained:
        from svdllm.recovery.sequential_lora import train_factors  # the Trainer takes seconds to import

        return train_factors(self.models.compressed, factors, task, training_dtype(self.models, self.settings))

    def _distill(self, task: Task) -> Trained:
        from svdllm.recovery.distill import distillation_loss, open_for_training
        from svdllm.recovery.training import train

        model = self.models.compressed(torch.float32)  # steps of training are too small for half precision
        open_for_training(model, self.settings.train_norms)
        loss_of = None  # the text's own
        if self.settings.teacher is not None and self.settings.kl > 0:
            loss_of = distillation_loss(self.models.dense(), self.settings.kl)
        return train(model, task, training_dtype(self.models, self.settings), loss_of)

    def _blockwise(self, task: Task) -> Trained:
        ids = torch.stack([ids for ids, _ in task.rows])
        dense, compressed = self.models.walks(ids, self.settings.of("blockwise", "batch"))
        errors = train_blocks(dense, compressed, task)
        blocks = map(compressed.skeleton.get_submodule, compressed.structure.blocks)
        epochs = int(self.settings.of("blockwise", "epochs"))
        record = TrainingRecord(
            stage=task.title,
            steps=epochs * len(compressed.batches),
            tokens=epochs * ids.numel(),
            seconds=self.reporter.seconds[task.title],
            trained_params=sum(parameter.numel() for block in blocks for parameter in block.parameters()),
            losses=[(index, error.after) for index, error in enumerate(errors)],
        )
        return record, None

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

    def _write(self, result: RecoveryResult) -> None:
        """The same checkpoint with other weights, and its history."""
        new = self.work / FINISHED
        shutil.rmtree(new, ignore_errors=True)
        (new / "svdllm").mkdir(parents=True)
        with self.reporter.stage("write", 1):
            weights, folder = self.models.weights(), self.models.folder
            write_shards(new, weights, {name: weights.shape_and_dtype(name) for name in weights.names()})
            copy_companions(folder, new)
            shutil.copyfile(folder / "config.json", new / "config.json")
            report = read_report(folder)
            # What smaller sizes are cut from was not trained.
            recipe = make_recipe(load_settings(folder / RECIPE_FILE) | {"elastic": False})
            report["recovery"] = [*report.get("recovery", []), result.history()]
            finish_checkpoint(new, recipe.to_yaml(), report, self.models.device, self.reporter)
        self.output.complete()
