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
from svdllm.data.examples import holds_examples, training_examples
from svdllm.data.specs import require_extra
from svdllm.errors import InputError, NumericalError, SvdllmError
from svdllm.evaluate import perplexity
from svdllm.memory import peak_bytes, saying_what_to_lower
from svdllm.modeling.lowrank import sha256_of
from svdllm.plan import resolve_device, resolve_dtype
from svdllm.progress import Reporter
from svdllm.recover.blockwise import train_blocks
from svdllm.recover.later_weights import LaterWeights
from svdllm.recover.processes import is_main, wait_for_all
from svdllm.recover.record import Measured, RecoveryResult, TrainingRecord
from svdllm.recover.settings import ORDERS, Recovery
from svdllm.source import build_skeleton, load_config, open_config, open_source
from svdllm.stream import Walk
from svdllm.structure import discover
from svdllm.version import __version__
from svdllm.weights import SafetensorsWeights, Weights, weight_files
from svdllm.workspace import claim_work_folder, named_folder, require_empty, require_ours

SETTINGS_FOLDER = "analysis"  # of a work folder: what decides its content
Rows = Sequence[tuple[Tensor, Tensor]]
Trained = tuple[TrainingRecord, dict[str, Tensor]]
Stage = Callable[[Path], Trained]


def recover(
    folder: str | Path,
    output_dir: str | Path,
    settings: Recovery,
    *,
    ppl: Sequence[str] = (),
    ppl_seqlen: int = 512,
    ppl_windows: int | None = 16,
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

    def check_cheaply(self) -> None:
        """What can be wrong without loading a model."""
        require_empty(self.output_dir)
        read_report(self.folder)
        resolve_device(self.settings.device)
        for text in (self.settings.data, *self.ppl):
            check_source(text)
        if "sequential-lora" in self.settings.methods:
            require_extra("peft", "--method sequential-lora", extra="recover")
        teacher = self.settings.teacher
        if "blockwise" in self.settings.methods and teacher is None:
            raise InputError("--method blockwise needs --teacher: the dense model, whose blocks' outputs are matched.")
        if teacher is not None:
            ours = self.config.get_text_config().vocab_size
            theirs = open_config(teacher, offline=self.offline).config.get_text_config().vocab_size
            if ours != theirs:
                raise InputError(
                    f"--teacher {teacher} has {theirs} tokens in its vocabulary, {self.folder} has {ours}: the teacher is "
                    "the dense model that this one was made of."
                )
        require_ours(self.work)

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
        with self.reporter.stage("open", 1):
            tokenizer = open_config(self.folder, offline=self.offline).load_tokenizer(self.offline)
            texts = {text: evaluation_tokens(text, tokenizer, offline=self.offline) for text in self.ppl}
        self._open_work_folder()
        measured: Measured = {text: {} for text in texts}
        self._measure("before", measured, texts)
        if self.settings.teacher is not None:
            self._measure("teacher", measured, texts)
        records = [self._once(name, stage) for name, stage in self._stages(tokenizer)]
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

    def _stages(self, tokenizer: Any) -> Iterator[tuple[str, Stage]]:
        """What is run, in order: a name for its files, and a function of the folder that it may work in."""
        for number, method in enumerate(self.settings.methods):
            rows = self._rows(method, tokenizer)
            if method == "sequential-lora":
                for step, factors in enumerate(ORDERS[self.settings.order]):
                    yield f"{number}-{step}-lora-{'-'.join(factors)}", partial(self._lora, factors, rows)
            else:
                run = self._distill if method == "distill" else self._blockwise
                yield f"{number}-{method}", partial(run, rows)

    def _once(self, name: str, stage: Stage) -> TrainingRecord:
        """A stage, or what an earlier run made of it."""
        tensors, record = self.work / f"{name}.safetensors", self.work / f"{name}.json"
        if tensors.is_file():
            return TrainingRecord(**json.loads(record.read_text(encoding="utf-8")))
        done, changed = stage(self.work / name)
        if is_main():
            write_atomically(record, json.dumps(asdict(done)).encode())
            save_atomically(changed, tensors)
            shutil.rmtree(self.work / name, ignore_errors=True)
        wait_for_all()
        return done

    def _lora(self, factors: tuple[str, ...], rows: Rows, folder: Path) -> Trained:
        from svdllm.recover.sequential_lora import train_factors  # the Trainer takes seconds to import

        return train_factors(self._model(), factors, rows, self.settings, folder, self.reporter)

    def _distill(self, rows: Rows, folder: Path) -> Trained:
        from svdllm.recover.distill import divergence_from, open_for_training
        from svdllm.recover.training import train

        model = self._model(torch.float32)  # steps of training are too small for half precision
        open_for_training(model, self.settings.train_norms)
        loss_of = None if self.settings.teacher is None else divergence_from(self._teacher())
        record = train(model, rows, self.settings, "distill", "distill", folder, self.reporter, loss_of)
        return record, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def _blockwise(self, rows: Rows, folder: Path) -> Trained:
        ids = torch.stack([ids for ids, _ in rows])
        assert self.settings.teacher is not None
        teacher = open_source(self.settings.teacher, offline=self.offline, gguf_folder=self.work / "teacher")
        assert teacher.weights is not None
        dense = self._walk(teacher.weights, teacher.config, ids)
        compressed = self._walk(self._weights(), self.config, ids)
        trained, errors = train_blocks(dense, compressed, self.settings, folder, self.reporter)
        epochs = round(self.settings.of("blockwise", "epochs"))
        record = TrainingRecord(
            stage="blockwise",
            steps=epochs * len(compressed.batches),
            tokens=epochs * ids.numel(),
            seconds=self.reporter.seconds["blockwise"],
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
            device=resolve_device(self.settings.device),
            dtype=torch.float32,
            batch_tokens=self.settings.of("blockwise", "batch") * ids.shape[1],
        )

    def _weights(self) -> LaterWeights:
        """The checkpoint's, as far as they are trained now."""
        return LaterWeights(SafetensorsWeights(self.folder, build_skeleton(self.config)), self.finished_stages)

    def _model(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The compressed model as far as it is trained now; by default in float32 on a CPU, in its own dtype on a GPU."""
        device = resolve_device(self.settings.device)
        with self.reporter.stage("load", 1):
            stored = self.config.dtype if isinstance(self.config.dtype, torch.dtype) else torch.float32
            model = load_model(self.folder, dtype=dtype or resolve_dtype("auto", device, stored))
            for file in self.finished_stages:
                model.load_state_dict(load_file(file), strict=False)
        return model.requires_grad_(False).to(device)  # type: ignore[arg-type]

    def _teacher(self) -> PreTrainedModel:
        teacher, device = self.settings.teacher, resolve_device(self.settings.device)
        assert teacher is not None
        dtype = resolve_dtype("auto", device, open_config(teacher, offline=self.offline).dtype)
        with self.reporter.stage("load", 1):
            model = load_model(teacher, dtype=dtype, local_files_only=self.offline)
        return model.eval().requires_grad_(False).to(device)  # type: ignore[arg-type]

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
            finish_checkpoint(new, recipe, report, resolve_device(self.settings.device), self.reporter)
        self.output_dir.parent.mkdir(parents=True, exist_ok=True)
        new.replace(self.output_dir)
        shutil.rmtree(self.work)
