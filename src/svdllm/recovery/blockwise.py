"""Block by block: each compressed block is trained to reproduce the outputs of the dense block.

The compressed block gets the inputs that the compressed model computes, the dense block those of the dense model. One
block of each is in memory. Finished blocks are files, so a killed run continues with the next block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from svdllm.common.errors import NumericalError
from svdllm.common.files import save_atomically
from svdllm.common.settings import setting
from svdllm.models.walk import Block, Walk
from svdllm.recovery.method import Method
from svdllm.recovery.models import Models
from svdllm.recovery.record import TrainingRecord
from svdllm.recovery.stage import Task, Trained
from svdllm.recovery.training_data import Lesson, TrainingData
from svdllm.recovery.training_settings import BETA2, Schedule, TrainingSettings

SAMPLES = 64


class BlockwiseSettings(TrainingSettings):
    """The settings of block by block training alone."""

    samples: int | None = setting(
        None, "Random windows of a text (blockwise).", panel="Data", shown_default=str(SAMPLES), ge=1
    )


class Blockwise(Method):
    """Trains one block after the other on what the dense blocks hand on, in one process."""

    name = "blockwise"
    summary = "each block's output matched to the dense block's"
    defaults = Schedule(lr=1e-4, batch=4, seqlen=512, epochs=4)
    Settings = BlockwiseSettings
    uses_trainer = False
    teacher = "required"
    same_as_teacher: ClassVar[Mapping[str, str]] = {"num_hidden_layers": "blocks", "hidden_size": "hidden features"}
    takes_mixtures = True
    whole_epochs = True

    def lesson(self, data: TrainingData) -> Lesson:
        """Random windows of a text."""
        return data.random_windows(cast(BlockwiseSettings, data.settings).samples or SAMPLES)

    def train(self, task: Task, models: Models) -> Trained:
        """Trains every block; the trained tensors are files in the task's folder."""
        ids = torch.stack([ids for ids, _ in task.rows])
        dense, compressed = models.walks(ids, task.schedule.batch)
        errors = train_blocks(dense, compressed, task)
        blocks = map(compressed.skeleton.get_submodule, compressed.structure.blocks)
        epochs = int(task.schedule.epochs or 0)
        record = TrainingRecord(
            stage=task.title,
            steps=epochs * len(compressed.batches),
            tokens=epochs * ids.numel(),
            seconds=task.reporter.seconds[task.title],
            trained_params=sum(parameter.numel() for block in blocks for parameter in block.parameters()),
            losses=[(index, error.after) for index, error in enumerate(errors)],
        )
        return record, None


@dataclass(frozen=True)
class BlockErrors:
    """The mean relative error of a block's outputs, before and after the block is trained."""

    before: float
    after: float


def train_blocks(dense: Walk, compressed: Walk, task: Task) -> list[BlockErrors]:
    """Trains every block and writes its tensors to a file in the task's folder.

    Both walks carry the same windows in the same batches. A block whose file exists is not trained again.

    Raises:
        NumericalError: a loss is not finite; names the block.
    """
    task.folder.mkdir(parents=True, exist_ok=True)
    reporter = task.reporter
    errors = []
    num_blocks = len(compressed.structure.blocks)
    with reporter.stage(task.title, num_blocks):
        for ours, theirs in zip(compressed.blocks(), dense.blocks(), strict=True):
            theirs.run()
            file = task.folder / f"block-{ours.index:04d}.safetensors"
            before = _mean_error(_outputs(ours), dense)
            if file.is_file():
                stored = load_file(file)
                for name, parameter in _parameters(ours).items():
                    parameter.data.copy_(stored[name])
            else:
                _train_block(ours, dense, task)
                save_atomically(_parameters(ours), file)
            ours.run()
            outputs = (compressed.hidden.tensor[batch] for batch in compressed.batches)
            errors.append(BlockErrors(before, _mean_error(outputs, dense)))
            reporter.advance(ours.index + 1, num_blocks)
            reporter.note(
                f"block {ours.index + 1}/{num_blocks}: relative error {errors[-1].before:.4f} -> {errors[-1].after:.4f}"
            )
    for walk in (dense, compressed):
        walk.close()
    return errors


def _train_block(block: Block, dense: Walk, task: Task) -> None:
    """Trains all parameters of a block, including its norms, with AdamW."""
    walk, settings = block.walk, task.settings
    parameters = [parameter.requires_grad_(True) for parameter in block.module.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=task.schedule.lr, betas=(0.9, BETA2), weight_decay=settings.weight_decay
    )
    epochs, batches = int(task.schedule.epochs or 0), walk.batches
    steps = epochs * len(batches)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(settings.warmup * steps), steps)
    generator = torch.Generator().manual_seed(settings.seed + block.index)
    for _ in range(epochs):
        for number in torch.randperm(len(batches), generator=generator).tolist():
            wanted = dense.hidden.tensor[batches[number]].to(walk.device)
            with torch.enable_grad():
                found = block.run_on(walk.hidden, number).hidden
                loss = _relative_errors(found, wanted).mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            if not bool(torch.isfinite(loss) and torch.isfinite(norm)):
                raise NumericalError(
                    f"The loss of block {block.index} ({block.name}) is {float(loss)}, the norm of its gradient "
                    f"{float(norm)}. Finished blocks are kept; start over with a lower --lr."
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
    for parameter in parameters:
        parameter.requires_grad_(False)


@torch.no_grad()
def _outputs(block: Block) -> Iterator[Tensor]:
    """Yields the block's outputs batch by batch, without advancing the walk."""
    for number in range(len(block.walk.batches)):
        yield block.run_on(block.walk.hidden, number).hidden.cpu()


def _relative_errors(found: Tensor, wanted: Tensor) -> Tensor:
    """The error ``||y - y'||^2 / ||y||^2`` of every token.

    The error is taken token by token because the first tokens of a text may be a thousand times larger than the others:
    in a common sum, nothing else would be learnt. As it is relative, one learning rate fits all blocks.
    """
    difference = (found.float() - wanted.float()).pow(2).sum(-1)
    return difference / wanted.float().pow(2).sum(-1).clamp_min(torch.finfo(torch.float32).tiny)


def _mean_error(outputs: Iterable[Tensor], dense: Walk) -> float:
    """The mean error of a block's outputs against the hidden states that the dense walk has now."""
    lost = [
        _relative_errors(found, dense.hidden.tensor[batch]).flatten()
        for found, batch in zip(outputs, dense.batches, strict=True)
    ]
    return float(torch.cat(lost).double().mean())


def _parameters(block: Block) -> dict[str, Tensor]:
    return {f"{block.name}.{name}": parameter.detach() for name, parameter in block.module.named_parameters()}
