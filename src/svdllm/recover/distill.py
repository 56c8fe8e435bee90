"""End to end: all factors at once, by the dense model's predictions (KL divergence) or by the text (cross-entropy)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from svdllm.structure import find_blocks, is_linear


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


def divergence_from(teacher: nn.Module) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    """A loss: mean KL divergence (nats per token) of the model's predictions from the teacher's on the same tokens."""

    def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        given: Any = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
        with torch.no_grad():
            wanted = teacher(**given).logits.float().log_softmax(-1)
        found = model(**given).logits.float().log_softmax(-1)
        seen = inputs["attention_mask"].bool()
        return torch.nn.functional.kl_div(found[seen], wanted[seen], reduction="batchmean", log_target=True)

    return loss_of


def _width(model: Any) -> int:
    return model.config.get_text_config().hidden_size
