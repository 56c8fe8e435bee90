"""End to end: all factors at once, by the dense model's predictions (KL divergence), by the text (cross-entropy), or both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from svdllm.data.examples import NO_LABEL
from svdllm.models.linears import find_blocks, is_linear

# Of a batch: the sum over its tokens, and how many they are.
Loss = Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, Tensor]]


def open_for_training(model: nn.Module, train_norms: bool) -> None:
    """What gets gradients: the linears of the decoder blocks, low-rank or left dense; norms if asked for.

    Embeddings and head stay as they are: they are often one matrix, and were not compressed.
    """
    model.requires_grad_(False)
    blocks = [model.get_submodule(name) for name in find_blocks(model)]
    for block in blocks:
        for module in block.modules():
            if is_linear(module):
                module.requires_grad_(True)
    if train_norms:
        inside = {id(parameter) for block in blocks for parameter in block.parameters()}
        for parameter in model.parameters():
            if parameter.ndim == 1 and (id(parameter) in inside or parameter.numel() == _width(model)):
                parameter.requires_grad_(True)


def distillation_loss(teacher: nn.Module, kl: float) -> Loss:
    """``kl`` times the KL divergence from the teacher's predictions, the rest the cross-entropy of the text (nats).

    Both over the positions that a learnt token follows.
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
