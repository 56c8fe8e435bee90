"""Finds what is wrong with a recovery before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdllm.common.errors import InputError
from svdllm.common.extras import require_extra
from svdllm.common.processes import num_processes
from svdllm.data import check_source
from svdllm.data.examples import refuse_mixture
from svdllm.evaluation.windows import check_protocol
from svdllm.models.limits import require_context, require_known_ids
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.recovery.memory import require_memory_of_methods
from svdllm.recovery.method import Method
from svdllm.recovery.methods import METHODS
from svdllm.recovery.models import Models
from svdllm.recovery.settings import Recovery, users_of
from svdllm.recovery.stage import Task


def check_cheaply(
    models: Models, settings: Recovery, texts: Sequence[str], ppl_seqlen: int, log_dir: Path | None
) -> None:
    """Raises InputError or ResourceError for what is wrong with the settings, as far as configs and paths tell."""
    training_dtype(models, settings)
    check_data(settings, texts)
    if log_dir is not None:
        require_extra("tensorboard", "--log-dir", extra="tensorboard")
        if not any(METHODS[name].uses_trainer for name in settings.methods):
            raise InputError(
                f"--log-dir does nothing to {', '.join(settings.methods)}: it is for {' and '.join(users_of('steps'))}."
            )
    for method in (METHODS[name] for name in settings.methods):
        method.check_extra(f"--method {method.name}")
        _check_factors(models, method)
        _check_residual(models, method)
        _check_processes(method)
        _check_teacher(models, method)
    for name in settings.methods:
        _check_lengths(models, settings, name)
    check_protocol("windows", ppl_seqlen)
    require_context(models.config, ppl_seqlen, "--ppl-seqlen")


def training_dtype(models: Models, settings: Recovery) -> torch.dtype:
    """The dtype of the products in training.

    Raises:
        InputError: the device does not have it, or the weights would overflow in it.
    """
    name, device = settings.dtype, models.device
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and has_bfloat16 else torch.float32
    if name == "bfloat16" and not has_bfloat16:
        raise InputError(f"--dtype bfloat16: {torch.cuda.get_device_name(device)} does not have it; use float32.")
    if name == "float16" and models.stored_dtype == torch.bfloat16:
        raise InputError(
            f"--dtype float16: {models.folder} is in bfloat16, whose numbers and gradients may exceed what float16 can "
            "hold (65,504). Use bfloat16 or float32."
        )
    if name == "float16" and device.type == "cpu":
        raise InputError("--dtype float16 is for training on a GPU; on a CPU use float32.")
    return getattr(torch, name)


def check_data(settings: Recovery, texts: Sequence[str]) -> None:
    """Raises InputError for a text that cannot be read, or that a method cannot learn from."""
    held_out = settings.eval_data
    for text in (settings.data, *([] if held_out is None else [held_out]), *texts):
        check_source(text)
    if held_out is not None:
        refuse_mixture(held_out)
    for name in settings.methods:
        METHODS[name].check_data(settings)


def _check_factors(models: Models, method: Method) -> None:
    info = LowRankInfo.of(models.config)
    if method.trains_factors_only and not (info and info.ranks):
        raise InputError(
            f"--method {method.name} trains factors, and {models.folder} has none: its linears are dense or narrower. "
            "Use --method distill or blockwise."
        )


def _check_residual(models: Models, method: Method) -> None:
    """Raises InputError if a method compares hidden states with the teacher's, of which a sliced model has a part."""
    info = LowRankInfo.of(models.config)
    if "hidden_size" in method.same_as_teacher and info and "embedding_widths" in info.removed:
        raise InputError(
            f"--method {method.name} compares hidden states with those of the teacher, and {models.folder} has fewer "
            "features in them: its residual was sliced. Use --method distill."
        )


def _check_processes(method: Method) -> None:
    if not method.uses_trainer and num_processes() > 1:
        raise InputError(
            f"--method {method.name} runs in one process, these are {num_processes()}: run it alone first, then the "
            "other methods on the checkpoint that it makes."
        )


def _check_teacher(models: Models, method: Method) -> None:
    if models.teacher is None:
        if method.teacher == "required":
            raise InputError(
                f"--method {method.name} needs --teacher: the dense model that the checkpoint was made of."
            )
        return
    theirs = models.dense_config.config.get_text_config()
    ours = models.config.get_text_config()
    for name, counted in {"vocab_size": "tokens in its vocabulary", **method.same_as_teacher}.items():
        if (wanted := getattr(ours, name)) != (found := getattr(theirs, name)):
            raise InputError(
                f"--teacher {models.teacher} has {found} {counted}, {models.folder} has {wanted}: give the dense model "
                "that the checkpoint was made of."
            )


def _check_lengths(models: Models, settings: Recovery, method: str) -> None:
    schedule = settings.schedule(method)
    require_context(models.config, schedule.seqlen, "--seqlen")
    if schedule.batch % num_processes():
        raise InputError(
            f"--batch {schedule.batch} cannot be shared evenly by {num_processes()} processes: give a multiple of "
            f"{num_processes()}."
        )


def check_tokens(models: Models, tokenizer: Any, texts: Iterable[Tensor], tasks: Sequence[Task]) -> None:
    """Raises InputError if the model has no embedding of an id in the texts or in the sequences of the tasks."""
    sequences = (ids for task in tasks for ids, _ in (*task.rows, *task.held_out))
    for ids in (*texts, *sequences):
        require_known_ids(ids, models.config, tokenizer)


def check_memory(models: Models, needed: dict[str, int]) -> None:
    """Raises ResourceError if the bytes that a method needs at the least are not free.

    Several processes are not checked: each may hold a part of the model.
    """
    if num_processes() > 1:
        return
    advice = METHODS[max(needed, key=lambda name: needed[name])].memory_advice
    require_memory_of_methods(needed, models.device, advice)
