"""Trains one stage with the transformers Trainer: its arguments, and the checks of every loss and gradient."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint

from svdllm.common.errors import InputError, NumericalError
from svdllm.common.processes import is_first, num_processes
from svdllm.common.progress import Reporter
from svdllm.data.examples import padded
from svdllm.recovery.distributed import own_device, wait_for_all
from svdllm.recovery.record import TrainingRecord
from svdllm.recovery.stage import Loss, Rows, Task
from svdllm.recovery.training_settings import BETA2

SAVES_PER_STAGE = 10
LOGS_PER_STAGE = 20
EVALUATIONS_PER_STAGE = 5  # of the held-out examples


def train(model: nn.Module, task: Task, loss_of: Loss | None = None) -> tuple[TrainingRecord, dict[str, Tensor]]:
    """Trains the parameters that require gradients, in place; continues from the last checkpoint in the task's folder.

    Args:
        loss_of: the loss; None for the model's own.

    Returns:
        The record, and the trained tensors by name. They are whole, also where processes hold parts of them (FSDP).

    Raises:
        InputError: the launcher shards the model in a way that is not supported.
        NumericalError: the loss or a gradient is not finite, or the loss is exactly zero; names step and layer.
    """
    arguments = training_arguments(task)
    trained_params = sum(p.numel() for p in model.parameters() if p.requires_grad)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=_Rows(task.rows),
        eval_dataset=_Rows(task.held_out) if task.held_out else None,
        data_collator=padded,
        callbacks=_callbacks(task),
    )
    trainer.remove_callback(PrinterCallback)  # ours prints
    trainer.loss_of = loss_of
    if loss_of is not None:
        trainer.model_accepts_loss_kwargs = True  # the tokens of a whole step are counted for it
    _require_fsdp2(trainer)
    with task.reporter.stage(task.title, max(1, arguments.max_steps)):
        last = _last_checkpoint(task.folder)
        arguments.eval_on_start = bool(task.held_out) and last is None
        trainer.train(resume_from_checkpoint=last)
        assert trainer.model is not None  # with FSDP another object than ours
        trained = whole_tensors(trainer.model)
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # from now on it computes in its own dtype
    state = trainer.state
    return TrainingRecord(
        stage=task.title,
        steps=state.global_step,
        tokens=int(state.num_input_tokens_seen),
        seconds=task.reporter.seconds[task.title],
        trained_params=trained_params,
        losses=[(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry],
        held_out=[(entry["step"], entry["eval_loss"]) for entry in state.log_history if "eval_loss" in entry],
    ), trained


def training_arguments(task: Task) -> TrainingArguments:
    """The Trainer's arguments. A step takes ``batch`` sequences over all processes."""
    settings, batch, micro = task.settings, task.schedule.batch, task.sequences_at_once
    steps = num_steps(task)
    arguments = TrainingArguments(
        output_dir=str(task.folder),
        max_steps=steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        learning_rate=task.schedule.lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        adam_beta2=BETA2,
        max_grad_norm=settings.clip,
        bf16=task.dtype == torch.bfloat16,
        fp16=task.dtype == torch.float16,
        use_cpu=own_device(settings.device).type == "cpu",
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=max(1, steps // LOGS_PER_STAGE),
        logging_nan_inf_filter=False,
        eval_strategy="steps" if task.held_out else "no",
        eval_steps=settings.eval_steps or max(1, steps // EVALUATIONS_PER_STAGE),
        prediction_loss_only=True,
        label_names=["labels"],
        save_steps=max(1, steps // SAVES_PER_STAGE),
        save_total_limit=1,
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        **_checkpointing(settings.gradient_checkpointing),
    )
    if num_processes() == 1:
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are used by several processes only
    arguments.gradient_accumulation_steps = batch // (micro * num_processes())
    # Otherwise the configuration of accelerate would decide.
    arguments.mixed_precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(task.dtype, "no")
    return arguments


def num_steps(task: Task) -> int:
    """Optimizer steps of a stage: those of the schedule, or as many as its epochs take."""
    schedule = task.schedule
    if schedule.steps is not None:
        return schedule.steps
    assert schedule.epochs is not None
    return max(1, math.ceil(schedule.epochs * len(task.rows) / schedule.batch))


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """The Trainer's arguments of gradient checkpointing, which newer versions call by another name."""
    if not wanted:
        return {}
    known = {field.name for field in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _last_checkpoint(folder: Path) -> str | None:
    """The last complete checkpoint. A run that was killed while it saved leaves an incomplete one, which is removed."""
    if is_first():
        for checkpoint in folder.glob("checkpoint-*"):
            try:
                json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # written last
            except (OSError, ValueError):
                shutil.rmtree(checkpoint)
    wait_for_all()
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def _callbacks(task: Task) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [_Progress(task.reporter)]
    if task.log_dir is not None and is_first():
        from torch.utils.tensorboard import SummaryWriter

        callbacks.append(TensorBoardCallback(SummaryWriter(str(task.log_dir / task.file))))
    return callbacks


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of the model (FSDP)."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors of a model, by name. Every process must call this, and gets whole tensors."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.full_tensor().cpu() if isinstance(p, DTensor) else p for name, p in trained.items()}


def _require_fsdp2(trainer: Trainer) -> None:
    if not trainer.is_fsdp_enabled:
        return
    version = getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1)
    if version != 2:
        raise InputError(
            f"FSDP version {version} was asked for, which hides the factors in flat parameters. Use version 2: "
            "fsdp_version: 2 in the configuration of accelerate, or --fsdp_version 2 of accelerate launch."
        )


class _Trainer(Trainer):
    """Stops at the first NaN or infinity, before the optimizer step."""

    loss_of: Loss | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The mean loss over the tokens of a whole step, which may be spread over micro-batches and processes."""
        if self.loss_of is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        total, tokens = self.loss_of(model, inputs)
        if num_items_in_batch is None:
            loss = total / tokens
        else:  # gradients of processes are averaged
            loss = total / num_items_in_batch * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        step = self.state.global_step + 1
        if not bool(torch.isfinite(loss)):
            raise NumericalError(
                f"The loss is {float(loss)} in step {step}{_first_bad_module(model, inputs)}. {_WHAT_TO_DO}"
            )
        if float(loss) == 0:
            raise NumericalError(
                f"The loss is exactly zero in step {step}: no token of the batch is learnt. Look at the data, or at "
                "--train-on and --seqlen."
            )
        if self.accelerator.scaler is None:  # which skips such a step and scales less
            self._require_finite_gradients(model, step)
        return loss

    def _require_finite_gradients(self, model: nn.Module, step: int) -> None:
        """Checks the gradients that this process has so far: FSDP hands gradients over at the end of a step."""
        known = [(name, _own_part(p.grad)) for name, p in model.named_parameters() if p.grad is not None]
        if not known:
            return
        finite = torch.stack([torch.isfinite(gradient).all() for _, gradient in known])
        if not bool(finite.all()):
            name = known[int((~finite).nonzero()[0])][0]
            raise NumericalError(f"The gradient of {name} is not finite in step {step}. {_WHAT_TO_DO}")


def _own_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


_WHAT_TO_DO = "The last saved step is kept: the same command goes on from there; with a lower --lr, start over."


class _Progress(TrainerCallback):
    def __init__(self, reporter: Reporter):
        self._reporter = reporter

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._reporter.advance(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:
            self._reporter.note(f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.4f}")
        if logs and "eval_loss" in logs and state.is_world_process_zero:
            self._reporter.note(f"step {state.global_step}: loss on held-out data {logs['eval_loss']:.4f}")


class _Rows(Dataset):
    def __init__(self, rows: Rows):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, labels = self._rows[index]
        return {"input_ids": ids, "labels": labels}


@torch.no_grad()
def _first_bad_module(model: nn.Module, inputs: Any) -> str:
    """``, first in <module>``: runs the batch once more to find the first module whose output is not finite."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        model(**{name: value for name, value in inputs.items() if name != "labels"})
    finally:
        for handle in handles:
            handle.remove()
    return f", first in {found[0]}" if found else ""
