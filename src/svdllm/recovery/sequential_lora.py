"""Algorithm 3, the sequential low-rank update: LoRA on one factor of all linears, merged, then on the other."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from svdllm.common.errors import NumericalError
from svdllm.common.memory import skeleton_bytes
from svdllm.common.settings import setting
from svdllm.evaluation.perplexity import evaluation_mode
from svdllm.models.logits import compare_logits, full_precision
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.low_rank.lowrank import share_first_factors
from svdllm.recovery.memory import logits_bytes
from svdllm.recovery.method import Method
from svdllm.recovery.models import Models
from svdllm.recovery.record import TrainingRecord
from svdllm.recovery.stage import Stage, Task, Trained
from svdllm.recovery.training_settings import Schedule, TrainingSettings

# The factors that each stage trains; joint is the paper's ablation (NFT).
ORDERS = {"u-first": (("svd_u",), ("svd_v",)), "v-first": (("svd_v",), ("svd_u",)), "joint": (("svd_u", "svd_v"),)}


class LoraSettings(TrainingSettings):
    """The settings of the sequential update alone."""

    order: Literal["u-first", "v-first", "joint"] = setting(
        "u-first",
        "Which factor is trained first; joint trains both at once (the paper's ablation).",
        panel="Sequential LoRA",
    )
    r: int = setting(8, "Rank of the LoRA adapters.", panel="Sequential LoRA", ge=1)
    alpha: float = setting(16, "Scale of the LoRA adapters: alpha / r.", panel="Sequential LoRA", gt=0)


class SequentialLora(Method):
    """The paper's update. Its batch, rank and learning rate are the paper's."""

    name = "sequential-lora"
    summary = "the paper's update: LoRA on one factor of all linears, then on the other"
    defaults = Schedule(lr=1e-4, batch=64, seqlen=256, epochs=1)
    Settings = LoraSettings
    trains_factors_only = True
    extra = ("peft", "recover")

    def stages(self, settings: TrainingSettings) -> Iterable[Stage]:
        """A stage for each factor, or one for both."""
        for step, factors in enumerate(ORDERS[cast(LoraSettings, settings).order]):
            title, file = f"lora {' and '.join(factors)}", f"{step}-lora-{'-'.join(factors)}"
            yield Stage(title=title, file=file, train=partial(self.train, factors=factors))

    def least_bytes(self, task: Task, models: Models) -> int:
        """Weights and logits; the adapters are small."""
        skeleton = models.skeleton(models.own_dtype)
        return skeleton_bytes(skeleton) + logits_bytes(task.sequences_at_once * task.longest, models.vocab_size)

    def train(self, task: Task, models: Models, factors: tuple[str, ...] = ("svd_u", "svd_v")) -> Trained:
        return train_factors(models.compressed, factors, task)


def train_factors(
    open_model: Callable[[], PreTrainedModel], factors: tuple[str, ...], task: Task
) -> tuple[TrainingRecord, dict[str, Tensor]]:
    """Trains adapters on the given factors of every low-rank linear and merges them; returns the tensors that changed.

    Args:
        open_model: the model as it is before the stage.
        factors: ``svd_u``, ``svd_v`` or both.

    Raises:
        NumericalError: the loss or a gradient is not finite, the merged model does not compute what the adapted one
            does, or a weight changed that was not trained.
    """
    from peft import LoraConfig

    from svdllm.recovery.training import is_sharded, train  # importing the Trainer takes seconds

    settings = cast(LoraSettings, task.settings)
    pattern = rf".*\.({'|'.join(factors)})"
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        target_modules=pattern,
        task_type="CAUSAL_LM",
    )

    model = open_model()
    before = _digests(model)
    stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
    set_seed(settings.seed)
    adapted = _with_adapters(model, config)
    if settings.gradient_checkpointing:
        adapted.enable_input_require_grads()
    record, adapters = train(adapted, task)
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
    """Shares first factors again: peft replaces a module that stands in two places in the first of them only."""
    if info := LowRankInfo.of(model.config):
        share_first_factors(model, info.shared_factors)


def _to_float32(adapted: nn.Module) -> None:
    """Converts parameters in half precision, in which a merge would lose most of what was learnt."""
    for parameter in adapted.parameters():
        if parameter.dtype.itemsize < 4:
            parameter.data = parameter.data.float()


@torch.no_grad()
@full_precision()
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
