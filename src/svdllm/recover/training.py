"""One stage of training, by the transformers Trainer: what it is told, and what is watched while it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from svdllm.data.examples import padded
from svdllm.errors import NumericalError
from svdllm.progress import Reporter
from svdllm.recover.record import TrainingRecord
from svdllm.recover.settings import Recovery

SAVES_PER_STAGE = 10
LOGS_PER_STAGE = 20


def train(
    model: nn.Module,
    rows: Sequence[tuple[Tensor, Tensor]],
    settings: Recovery,
    method: str,
    stage: str,
    folder: Path,
    reporter: Reporter,
    loss_of: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None,
) -> TrainingRecord:
    """Trains what requires gradients, in place; goes on with the last checkpoint in ``folder`` if there is one.

    Args:
        rows: (input_ids, labels) of every example.
        method: whose defaults hold where the settings say nothing.
        stage: for progress and the record.
        folder: the Trainer's; removed by whoever made it.
        loss_of: mean loss of a batch, instead of the model's own.

    Raises:
        NumericalError: the loss or a gradient is not finite, or the loss is exactly zero; names step and layer.
    """
    arguments = training_arguments(settings, method, len(rows), folder)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=_Rows(rows),
        data_collator=padded,
        callbacks=[_Progress(reporter)],
    )
    trainer.remove_callback(PrinterCallback)  # ours prints
    trainer.loss_of = loss_of
    if loss_of is not None:
        trainer.model_accepts_loss_kwargs = False  # a mean: the Trainer divides by the accumulation steps
    with reporter.stage(stage, max(1, arguments.max_steps)):
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        trainer.train(resume_from_checkpoint=last)
    state = trainer.state
    return TrainingRecord(
        stage=stage,
        steps=state.global_step,
        tokens=int(state.num_input_tokens_seen),
        seconds=reporter.seconds[stage],
        trained_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        losses=[(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry],
    )


def training_arguments(settings: Recovery, method: str, num_rows: int, folder: Path) -> TrainingArguments:
    """The Trainer's arguments; ``batch`` sequences a step over all processes."""
    cpu = settings.device == "cpu" or not torch.cuda.is_available()
    batch = settings.of(method, "batch")
    micro = min(batch, settings.micro_batch or 4)
    steps = settings.of(method, "steps") or max(1, math.ceil(settings.of(method, "epochs") * num_rows / batch))
    checkpointing = {}
    if settings.gradient_checkpointing:  # newer versions call it by another name
        known = {field.name for field in fields(TrainingArguments)}
        name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        checkpointing = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro,
        learning_rate=settings.of(method, "lr"),
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        bf16=not cpu and torch.cuda.is_bf16_supported(),
        use_cpu=cpu,
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=max(1, steps // LOGS_PER_STAGE),
        logging_nan_inf_filter=False,
        save_steps=max(1, steps // SAVES_PER_STAGE),
        save_total_limit=1,
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        **checkpointing,
    )
    arguments.gradient_accumulation_steps = max(1, math.ceil(batch / (micro * arguments.world_size)))
    return arguments


class _Trainer(Trainer):
    """Stops at the first number that is none, before it reaches the weights."""

    loss_of: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        if self.loss_of is None:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        return self.loss_of(model, inputs)

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
        trained = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        finite = torch.stack([torch.isfinite(gradient).all() for _, gradient in trained])
        if not bool(finite.all()):
            name = trained[int((~finite).nonzero()[0])][0]
            raise NumericalError(f"The gradient of {name} is not finite in step {step}. {_WHAT_TO_DO}")
        return loss


_WHAT_TO_DO = "The last saved step is kept: the same command goes on from there; with a lower --lr, start over."


class _Progress(TrainerCallback):
    def __init__(self, reporter: Reporter):
        self._reporter = reporter

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._reporter.advance(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:
            self._reporter.note(f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.4f}")


class _Rows(Dataset):
    def __init__(self, rows: Sequence[tuple[Tensor, Tensor]]):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, labels = self._rows[index]
        return {"input_ids": ids, "labels": labels}


@torch.no_grad()
def _first_bad_module(model: nn.Module, inputs: Any) -> str:
    """``, first in <module>``: found by running the batch once more."""
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
