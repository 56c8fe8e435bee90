"""End to end: trains all factors at once.

The loss is the KL divergence from the dense model's predictions, the cross-entropy of the text, or both.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from pydantic import model_validator
from torch import Tensor, nn

from svdllm.common.memory import skeleton_bytes
from svdllm.common.settings import setting
from svdllm.data.examples import NO_LABEL
from svdllm.models.linears import find_blocks, is_linear
from svdllm.models.low_rank import PackedLinear
from svdllm.recovery.memory import logits_bytes
from svdllm.recovery.method import Method
from svdllm.recovery.models import Models
from svdllm.recovery.stage import Loss, Task, Trained
from svdllm.recovery.training_data import FOR_EXAMPLES, Lesson, TrainingData
from svdllm.recovery.training_settings import Schedule, TrainingSettings

# Of AdamW: the gradient and two moments of a trained number.
ADAMW_BYTES = 4 + 4 + 4


class DistillSettings(TrainingSettings):
    """The settings of distillation alone."""

    kl: float = setting(
        0.5,
        "Share of the divergence from the teacher in the loss; the rest is the loss of the text (distill).",
        panel="Training",
        ge=0,
        le=1,
    )
    train_norms: bool = setting(False, "Also train the norms (distill).", panel="Training")

    @model_validator(mode="after")
    def _kl_has_a_teacher(self) -> DistillSettings:
        if "kl" in self.given and self.teacher is None:
            raise ValueError("kl needs a teacher: the dense model")
        return self


class Distill(Method):
    """Trains all factors at once, end to end."""

    name = "distill"
    summary = "all factors end to end, on the dense model's predictions and the text"
    defaults = Schedule(lr=1.5e-4, batch=2, seqlen=256, steps=400)
    Settings = DistillSettings
    teacher = "optional"
    takes_mixtures = True
    memory_advice = "--method sequential-lora keeps no gradients of the factors, blockwise one block; "

    def lesson(self, data: TrainingData) -> Lesson:
        """Examples, or as many random windows of a text as the steps take."""
        if data.holds_examples:
            return data.examples()
        steps = data.schedule.steps
        data.refuse_for_text(FOR_EXAMPLES if steps is not None else (*FOR_EXAMPLES, "epochs"))
        assert steps is not None
        return data.random_windows(steps * data.schedule.batch)

    def least_bytes(self, task: Task, models: Models) -> int:
        """Weights, gradients, AdamW's moments, the teacher's weights and the logits of both models."""
        settings = cast(DistillSettings, task.settings)
        skeleton = models.skeleton(torch.float32)
        open_for_training(skeleton, settings.train_norms)
        trained = sum(p.numel() for p in skeleton.parameters() if p.requires_grad)
        has_teacher = models.teacher is not None and settings.kl > 0
        logits = logits_bytes(task.sequences_at_once * task.longest, models.vocab_size, with_teacher=has_teacher)
        teacher = models.dense_bytes if has_teacher else 0
        return skeleton_bytes(skeleton) + trained * ADAMW_BYTES + teacher + logits

    def train(self, task: Task, models: Models) -> Trained:
        from svdllm.recovery.training import train  # importing the Trainer takes seconds

        settings = cast(DistillSettings, task.settings)
        model = models.compressed(torch.float32)  # steps of training are too small for half precision
        open_for_training(model, settings.train_norms)
        loss_of = None  # the model's own: the cross-entropy of the text
        if models.teacher is not None and settings.kl > 0:
            loss_of = distillation_loss(models.dense(), settings.kl)
        return train(model, task, loss_of)


def open_for_training(model: nn.Module, train_norms: bool) -> None:
    """Lets the linears of the decoder blocks be trained, low-rank or dense, and the norms if asked for.

    Embeddings and head stay frozen: they were not compressed, and are often one matrix.
    """
    model.requires_grad_(False)
    blocks = [model.get_submodule(name) for name in find_blocks(model)]
    for block in blocks:
        for module in block.modules():
            if is_linear(module) or isinstance(module, PackedLinear):  # which has a bias of its own
                module.requires_grad_(True)
    if train_norms:
        inside = {id(parameter) for block in blocks for parameter in block.parameters()}
        for parameter in model.parameters():
            if parameter.ndim == 1 and (id(parameter) in inside or parameter.numel() == _width(model)):
                parameter.requires_grad_(True)


def distillation_loss(teacher: nn.Module, kl: float) -> Loss:
    """A loss in nats: ``kl`` times the divergence from the teacher and ``1 - kl`` times the cross-entropy of the text.

    Both are summed over the positions before a learnt token.
    """

    def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        given: Any = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
        following = inputs["labels"][:, 1:]
        learnt = following != NO_LABEL
        with torch.no_grad():
            wanted = teacher(**given).logits[:, :-1][learnt].float().log_softmax(-1)
        found = model(**given).logits[:, :-1][learnt].float().log_softmax(-1)
        loss = kl * torch.nn.functional.kl_div(found, wanted, reduction="sum", log_target=True)
        if kl < 1:
            loss = loss + (1 - kl) * torch.nn.functional.nll_loss(found, following[learnt], reduction="sum")
        return loss, learnt.sum()

    return loss_of


def _width(model: Any) -> int:
    return model.config.get_text_config().hidden_size
