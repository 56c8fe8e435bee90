"""A recovery from beginning to end: check, train stage by stage, write the same kind of checkpoint again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from svdllm.analysis import FINGERPRINT_FILE, read_settings, refuse_other_settings, save_atomically, write_atomically
from svdllm.checkpoint import (
    RECIPE_FILE,
    copy_companions,
    finish_checkpoint,
    load_model,
    read_report,
    write_shards,
)
from svdllm.config import load_settings, make_recipe
from svdllm.data import calibration_windows, check_source, evaluation_tokens
from svdllm.data.examples import holds_examples, refuse_mixture, training_examples
from svdllm.data.specs import require_extra
from svdllm.errors import InputError, NumericalError, SvdllmError
from svdllm.evaluate import perplexity
from svdllm.memory import peak_bytes, saying_what_to_lower
from svdllm.modeling.lowrank import sha256_of
from svdllm.plan import resolve_dtype
from svdllm.progress import Reporter
from svdllm.recover.blockwise import train_blocks
from svdllm.recover.later_weights import LaterWeights
from svdllm.recover.needs import least_bytes, require_memory, weight_bytes
from svdllm.recover.processes import is_main, meet, num_processes, own_device, wait_for_all
from svdllm.recover.record import Measured, RecoveryResult, TrainingRecord
from svdllm.recover.settings import ORDERS, Recovery
from svdllm.recover.task import Rows, Task
from svdllm.source import build_skeleton, load_config, open_config, open_source
from svdllm.stream import Walk
from svdllm.structure import discover
from svdllm.version import __version__
from svdllm.weights import SafetensorsWeights, Weights, weight_files
from svdllm.workspace import claim_work_folder, named_folder, require_empty, require_ours, require_writable

SETTINGS_FOLDER = "analysis"  # of a work folder: what decides its content
Trained = tuple[TrainingRecord, dict[str, Tensor]]
Stage = Callable[[Task], Trained]


def recover(
    folder: str | Path,
    output_dir: str | Path,
    settings: Recovery,
    *,
    ppl: Sequence[str] = (),
    ppl_seqlen: int = 512,
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
            ``<output_dir>.partial``, and a killed run goes on from there.
        settings: what is trained, how, and on what.
        ppl: texts on which perplexity is measured before and after, and of the teacher if there is one.
        ppl_seqlen, ppl_windows: windows of these texts.
        log_dir: where TensorBoard logs are written, a folder in it for each stage.
        offline: never ask the hub.
        resume: go on with an unfinished run in ``<output_dir>.partial``; otherwise start over.
        reporter: is told about stages and progress.

    Raises:
        InputError: a setting, path or text is wrong; nothing is left behind.
        ResourceError: the memory does not suffice; says what to lower.
        NumericalError: the loss or a gradient is not finite; names step and layer. The last saved step is kept.
    """
    run = _Run(
        folder=Path(folder),
        output_dir=named_folder(output_dir),
        settings=settings,
        ppl=tuple(ppl),
        ppl_seqlen=ppl_seqlen,
        ppl_windows=ppl_windows,
        log_dir=None if log_dir is None else Path(log_dir),
        offline=offline,
        resume=resume,
        reporter=reporter if reporter is not None and is_main() else Reporter(),
    )
    run.check_cheaply()
    with run.explaining():
        return run.execute()


@dataclass(kw_only=True)
class _Run:
    """One recovery. What a finished stage changed is a file of tensors in the work folder."""

    folder: Path
    output_dir: Path
    settings: Recovery
    ppl: tuple[str, ...]
    ppl_seqlen: int
    ppl_windows: int | None
    log_dir: Path | None
    offline: bool
    resume: bool
    reporter: Reporter
    examples: dict[str, Any] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        return self.output_dir.with_name(f"{self.output_dir.name}.partial")

    @property
    def finished_stages(self) -> list[Path]:
        return sorted(self.work.glob("*.safetensors"))

    @cached_property
    def config(self) -> PreTrainedConfig:
        return load_config(self.folder, str(self.folder))

    @cached_property
    def device(self) -> torch.device:
        return own_device(self.settings.device)

    @property
    def stored_dtype(self) -> torch.dtype:
        return self.config.dtype if isinstance(self.config.dtype, torch.dtype) else torch.float32

    def check_cheaply(self) -> None:
        """What can be wrong without loading a model."""
        require_empty(self.output_dir)
        require_writable(self.output_dir)
        read_report(self.folder)
        self._training_dtype()
        methods, data, held_out = self.settings.methods, self.settings.data, self.settings.eval_data
        for text in (data, *([] if held_out is None else [held_out]), *self.ppl):
            check_source(text)
        if held_out is not None:
            refuse_mixture(held_out)
        if self.log_dir is not None:
            require_extra("tensorboard", "--log-dir", extra="tensorboard")
        if "sequential-lora" in methods:
            require_extra("peft", "--method sequential-lora", extra="recover")
            refuse_mixture(data)
        teacher = self.settings.teacher
        if "blockwise" in methods:
            if teacher is None:
                raise InputError(
                    "--method blockwise needs --teacher: the dense model, whose blocks' outputs are matched."
                )
            if num_processes() > 1:
                raise InputError(
                    f"--method blockwise runs in one process, these are {num_processes()}: run it alone first, then the "
                    "other methods on what it made."
                )
        if teacher is not None:
            ours = self.config.get_text_config().vocab_size
            theirs = open_config(teacher, offline=self.offline).config.get_text_config().vocab_size
            if ours != theirs:
                raise InputError(
                    f"--teacher {teacher} has {theirs} tokens in its vocabulary, {self.folder} has {ours}: the teacher is "
                    "the dense model that this one was made of."
                )
        require_ours(self.work)
        self._require_memory()

    def _require_memory(self) -> None:
        """Launchers may share a model out over the processes, so it is asked of a single one only."""
        if num_processes() > 1:
            return
        teacher_bytes = 0
        if self.settings.teacher is not None:
            dense = open_config(self.settings.teacher, offline=self.offline)
            teacher_bytes = weight_bytes(build_skeleton(dense.config, resolve_dtype("auto", self.device, dense.dtype)))
        needed = {}
        for method in self.settings.methods:
            dtype = torch.float32 if method == "distill" else resolve_dtype("auto", self.device, self.stored_dtype)
            vocab = self.config.get_text_config().vocab_size
            needed[method] = least_bytes(
                method, self.settings, build_skeleton(self.config, dtype), vocab, teacher_bytes
            )
        require_memory(needed, self.device)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """A run that fails before anything was learnt leaves nothing; memory that is short is said with a way out."""
        new = not self.work.exists()
        advice = (
            "The last saved step is kept. Lower --micro-batch or --seqlen, or use --gradient-checkpointing; this starts "
            "over with --no-resume."
        )
        with saying_what_to_lower(advice):
            try:
                yield
            except NumericalError:
                raise
            except SvdllmError:
                if new:
                    shutil.rmtree(self.work, ignore_errors=True)
                raise

    def execute(self) -> RecoveryResult:
        meet(self.device)
        with self.reporter.stage("open", 1):
            tokenizer = open_config(self.folder, offline=self.offline).load_tokenizer(self.offline)
            texts = {text: evaluation_tokens(text, tokenizer, offline=self.offline) for text in self.ppl}
        self._open_work_folder()
        measured: Measured = {text: {} for text in texts}
        self._measure("before", measured, texts)
        if self.settings.teacher is not None:
            self._measure("teacher", measured, texts)
        records = [self._once(task, stage) for task, stage in self._stages(tokenizer)]
        self._measure("after", measured, texts)
        result = RecoveryResult(
            output_dir=self.output_dir,
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

    def _open_work_folder(self) -> None:
        """Makes it, or takes up that of an earlier run with the same settings."""
        decides = {
            **{f"recovery: {key}": value for key, value in self.settings.model_dump(mode="json").items()},
            "weights of the checkpoint": [sha256_of(path) for path in weight_files(self.folder)],
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
        for number, method in enumerate(self.settings.methods):
            task = partial(
                self._task, method, rows=self._rows(method, tokenizer), held_out=self._held_out(method, tokenizer)
            )
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
        """A stage, or what an earlier run made of it."""
        tensors, record = self.work / f"{task.file}.safetensors", self.work / f"{task.file}.json"
        if tensors.is_file():
            return TrainingRecord(**json.loads(record.read_text(encoding="utf-8")))
        done, changed = stage(task)
        if is_main():
            write_atomically(record, json.dumps(asdict(done)).encode())
            save_atomically(changed, tensors)
            shutil.rmtree(task.folder, ignore_errors=True)
        wait_for_all()
        return done

    def _lora(self, factors: tuple[str, ...], task: Task) -> Trained:
        from svdllm.recover.sequential_lora import train_factors  # the Trainer takes seconds to import

        return train_factors(self._model, factors, task, self._training_dtype())

    def _distill(self, task: Task) -> Trained:
        from svdllm.recover.distill import divergence_from, open_for_training
        from svdllm.recover.training import train

        model = self._model(torch.float32)  # steps of training are too small for half precision
        open_for_training(model, self.settings.train_norms)
        loss_of = None if self.settings.teacher is None else divergence_from(self._teacher())
        return train(model, task, self._training_dtype(), loss_of)

    def _blockwise(self, task: Task) -> Trained:
        ids = torch.stack([ids for ids, _ in task.rows])
        assert self.settings.teacher is not None
        teacher = open_source(self.settings.teacher, offline=self.offline, gguf_folder=self.work / "teacher")
        assert teacher.weights is not None
        dense = self._walk(teacher.weights, teacher.config, ids)
        compressed = self._walk(self._weights(), self.config, ids)
        trained, errors = train_blocks(dense, compressed, task)
        epochs = round(self.settings.of("blockwise", "epochs"))
        record = TrainingRecord(
            stage=task.title,
            steps=epochs * len(compressed.batches),
            tokens=epochs * ids.numel(),
            seconds=self.reporter.seconds[task.title],
            trained_params=sum(tensor.numel() for tensor in trained.values()),
            losses=[(index, error.after) for index, error in enumerate(errors)],
        )
        return record, trained

    def _walk(self, weights: Weights, config: PreTrainedConfig, ids: Tensor) -> Walk:
        skeleton = build_skeleton(config)
        return Walk(
            weights=weights,
            skeleton=skeleton,
            structure=discover(skeleton),
            ids=ids,
            device=self.device,
            dtype=torch.float32,
            batch_tokens=self.settings.of("blockwise", "batch") * ids.shape[1],
        )

    def _weights(self) -> LaterWeights:
        """The checkpoint's, as far as they are trained now."""
        return LaterWeights(SafetensorsWeights(self.folder, build_skeleton(self.config)), self.finished_stages)

    def _model(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The compressed model as far as it is trained now; by default in float32 on a CPU, in its own dtype on a GPU."""
        with self.reporter.stage("load", 1):
            model = load_model(self.folder, dtype=dtype or resolve_dtype("auto", self.device, self.stored_dtype))
            for file in self.finished_stages:
                model.load_state_dict(load_file(file), strict=False)
        return model.requires_grad_(False).to(self.device)  # type: ignore[arg-type]

    def _teacher(self) -> PreTrainedModel:
        teacher = self.settings.teacher
        assert teacher is not None
        dtype = resolve_dtype("auto", self.device, open_config(teacher, offline=self.offline).dtype)
        with self.reporter.stage("load", 1):
            model = load_model(teacher, dtype=dtype, local_files_only=self.offline)
        return model.eval().requires_grad_(False).to(self.device)  # type: ignore[arg-type]

    def _rows(self, method: str, tokenizer: Any) -> Rows:
        """The examples of a method; random windows where blocks or all factors are trained on text."""
        settings = self.settings
        seqlen = settings.of(method, "seqlen")
        with self.reporter.stage("tokenise", 1):
            if method == "blockwise" or (method == "distill" and not holds_examples(settings.data, self.offline)):
                steps = settings.of(method, "steps")
                windows = calibration_windows(
                    settings.data,
                    tokenizer,
                    samples=settings.of(method, "samples")
                    if method == "blockwise"
                    else steps * settings.of(method, "batch"),
                    seqlen=seqlen,
                    seed=settings.seed,
                    offline=self.offline,
                )
                self.examples[method] = {"source": windows.source, "kind": "text", "examples": len(windows.ids)}
                return [(ids, ids) for ids in windows.ids]
            examples = training_examples(
                settings.data,
                tokenizer,
                seqlen=seqlen,
                template=settings.template,
                completions_only=settings.train_on == "completions",
                packing=settings.packing,
                offline=self.offline,
            )
        if examples.left_out:
            self.reporter.warn(
                f"{examples.left_out} examples are left out: their answers begin beyond --seqlen {seqlen}."
            )
        self.examples[method] = {
            "source": examples.source,
            "kind": examples.kind,
            "examples": len(examples.rows),
            "left_out": examples.left_out,
        }
        return examples.rows

    def _held_out(self, method: str, tokenizer: Any) -> Rows:
        settings = self.settings
        if settings.eval_data is None or method == "blockwise":
            return []
        with self.reporter.stage("tokenise", 1):
            examples = training_examples(
                settings.eval_data,
                tokenizer,
                seqlen=settings.of(method, "seqlen"),
                template=settings.template,
                completions_only=settings.train_on == "completions",
                offline=self.offline,
            )
        return examples.rows[: settings.eval_samples]

    def _training_dtype(self) -> torch.dtype:
        """Of the products in training.

        Raises:
            InputError: the device does not have it, or the weights would overflow in it.
        """
        name, kind = self.settings.dtype, self.device.type
        has_bfloat16 = kind != "cuda" or torch.cuda.is_bf16_supported()
        if name == "auto":
            return torch.bfloat16 if kind == "cuda" and has_bfloat16 else torch.float32
        if name == "bfloat16" and not has_bfloat16:
            raise InputError(
                f"--dtype bfloat16: {torch.cuda.get_device_name(self.device)} does not have it; use float32."
            )
        if name == "float16" and self.stored_dtype == torch.bfloat16:
            raise InputError(
                f"--dtype float16: {self.folder} is in bfloat16, whose numbers and gradients may exceed what float16 can "
                "hold (65,504). Use bfloat16 or float32."
            )
        if name == "float16" and kind == "cpu":
            raise InputError("--dtype float16 is for training on a GPU; on a CPU use float32.")
        return getattr(torch, name)

    def _measure(self, name: str, measured: Measured, texts: dict[str, Tensor]) -> None:
        if not texts:
            return
        model = self._teacher() if name == "teacher" else self._model()
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
        new = self.work / "finished"
        shutil.rmtree(new, ignore_errors=True)
        (new / "svdllm").mkdir(parents=True)
        with self.reporter.stage("write", 1):
            weights = self._weights()
            write_shards(new, weights, {name: weights.shape_and_dtype(name) for name in weights.names()})
            copy_companions(self.folder, new)
            shutil.copyfile(self.folder / "config.json", new / "config.json")
            report = read_report(self.folder)
            # What smaller sizes are cut from was not trained.
            recipe = make_recipe(load_settings(self.folder / RECIPE_FILE) | {"elastic": False})
            report["recovery"] = [*report.get("recovery", []), result.history()]
            finish_checkpoint(new, recipe, report, self.device, self.reporter)
        self.output_dir.parent.mkdir(parents=True, exist_ok=True)
        new.replace(self.output_dir)
        shutil.rmtree(self.work)
