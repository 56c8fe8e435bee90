"""Algorithm 3, the sequential low-rank update: LoRA on one factor of every pair, merged, then on the other."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from svdllm.common.errors import NumericalError
from svdllm.evaluation.perplexity import evaluation_mode
from svdllm.models.logits import compare_logits
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.low_rank.lowrank import share_first_factors
from svdllm.recovery.record import TrainingRecord
from svdllm.recovery.stage import Task
from svdllm.recovery.training import is_sharded, train


def train_factors(
    open_model: Callable[[], PreTrainedModel], factors: tuple[str, ...], task: Task, dtype: torch.dtype
) -> tuple[TrainingRecord, dict[str, Tensor]]:
    """One stage: adapters on the given factors of every low-rank linear, trained and merged; also the tensors it changed.

    Args:
        open_model: the model as it is before the stage.
        factors: ``svd_u``, ``svd_v`` or both.
        dtype: of the products in training.

    Raises:
        NumericalError: the loss or a gradient is not finite; a merged model answers otherwise than with its adapters; or
            a weight changed that was not trained.
    """
    from peft import LoraConfig

    settings = task.settings
    pattern = rf".*\.({'|'.join(factors)})"
    config = LoraConfig(r=settings.r, lora_alpha=settings.alpha, target_modules=pattern, task_type="CAUSAL_LM")  # type: ignore[arg-type]

    model = open_model()
    before = _digests(model)
    stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
    set_seed(settings.seed)
    adapted = _with_adapters(model, config)
    if settings.gradient_checkpointing:
        adapted.enable_input_require_grads()
    record, adapters = train(adapted, task, dtype)
    if is_sharded(adapted):  # each process has a part of it: put the whole together again
        model = open_model()
        adapted = _with_adapters(model, config)
        adapted.load_state_dict(adapters, strict=False)
    example = task.rows[0][0].unsqueeze(0)
    _to_float32(adapted)
    with_adapters = _logits(adapted, example)
    adapted.merge_and_unload(safe_merge=True)
    share_again(model)
    compare_logits(_logits(model, example), with_adapters, _not_merged)
    for name, parameter in model.requires_grad_(False).named_parameters():
        parameter.data = parameter.data.to(stored[name])
    changed = [name for name, digest in _digests(model).items() if before.get(name) != digest]
    if foreign := [name for name in changed if not re.fullmatch(pattern + r"\.weight", name)]:
        raise NumericalError(f"{foreign[0]} changed while only {' and '.join(factors)} were trained.")
    state = model.state_dict()
    return record, {name: state[name] for name in changed}


def _with_adapters(model: PreTrainedModel, config: Any) -> Any:
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it asks for what transformers has given another name
        adapted = get_peft_model(model, config)
    share_again(model)
    return adapted


def share_again(model: PreTrainedModel) -> None:
    """peft exchanges a module that stands in two places in the first of them only."""
    if info := LowRankInfo.of(model.config):
        share_first_factors(model, info.shared_factors)


def _to_float32(adapted: nn.Module) -> None:
    """Parameters in half precision: a sum in it would lose most of what was learnt, and hide what a merge gets wrong."""
    for parameter in adapted.parameters():
        if parameter.dtype.itemsize < 4:
            parameter.data = parameter.data.float()


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    device = next(model.parameters()).device
    with evaluation_mode(model):
        return model(input_ids=ids.to(device), use_cache=False).logits.float().cpu()


def _not_merged(how: str) -> NumericalError:
    return NumericalError(f"The merged model does not compute what the model with adapters does: {how}.")


def _digests(model: nn.Module) -> dict[str, bytes]:
    """A hash of every tensor."""
    return {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data).digest()
        for name, tensor in model.state_dict().items()
    }
