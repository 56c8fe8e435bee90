"""What can be wrong with a recovery, found before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdllm.common.errors import InputError
from svdllm.common.extras import require_extra
from svdllm.common.memory import skeleton_bytes
from svdllm.data import check_source
from svdllm.data.examples import refuse_mixture
from svdllm.evaluation.windows import check_protocol
from svdllm.models.limits import context_length, require_context, require_known_ids
from svdllm.models.skeleton import build_skeleton
from svdllm.recovery.distributed import num_processes
from svdllm.recovery.memory import least_bytes, require_memory
from svdllm.recovery.models import Models
from svdllm.recovery.settings import Recovery
from svdllm.recovery.stage import Task


def check_cheaply(
    models: Models, settings: Recovery, texts: Sequence[str], ppl_seqlen: int | None, log_dir: Path | None
) -> None:
    """Raises InputError or ResourceError for what needs no model to be seen."""
    training_dtype(models, settings)
    check_data(settings, texts)
    if log_dir is not None:
        require_extra("tensorboard", "--log-dir", extra="tensorboard")
        if set(settings.methods) == {"blockwise"}:
            raise InputError("--log-dir does nothing to blockwise: it is for sequential-lora and distill.")
    if "sequential-lora" in settings.methods:
        require_extra("peft", "--method sequential-lora", extra="recover")
    _check_teacher(models, settings)
    _check_lengths(models, settings)
    if ppl_seqlen is not None:
        check_protocol("windows", ppl_seqlen)
        require_context(models.config, ppl_seqlen, "--ppl-seqlen")


def training_dtype(models: Models, settings: Recovery) -> torch.dtype:
    """Of the products in training.

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
    """Raises InputError for a text that cannot be read, or not by the methods asked for."""
    held_out = settings.eval_data
    for text in (settings.data, *([] if held_out is None else [held_out]), *texts):
        check_source(text)
    if held_out is not None:
        refuse_mixture(held_out)
    if "sequential-lora" in settings.methods:
        refuse_mixture(settings.data)


def _check_teacher(models: Models, settings: Recovery) -> None:
    if "blockwise" in settings.methods:
        if models.teacher is None:
            raise InputError("--method blockwise needs --teacher: the dense model, whose blocks' outputs are matched.")
        if num_processes() > 1:
            raise InputError(
                f"--method blockwise runs in one process, these are {num_processes()}: run it alone first, then the other "
                "methods on what it made."
            )
    if models.teacher is not None:
        theirs = models.dense_config.config.get_text_config()
        ours = models.config.get_text_config()
        alike = {"vocab_size": "tokens in its vocabulary"}
        if "blockwise" in settings.methods:
            alike |= {"num_hidden_layers": "blocks", "hidden_size": "hidden features"}
        for name, what in alike.items():
            if (wanted := getattr(ours, name)) != (found := getattr(theirs, name)):
                raise InputError(
                    f"--teacher {models.teacher} has {found} {what}, {models.folder} has {wanted}: the teacher is the dense "
                    "model that this one was made of."
                )


def _check_lengths(models: Models, settings: Recovery) -> None:
    settings = settings.within(context_length(models.config))
    for method in settings.methods:
        batch = settings.of(method, "batch")
        require_context(models.config, settings.of(method, "seqlen"), "--seqlen")
        if batch % num_processes():
            raise InputError(
                f"--batch {batch} cannot be shared evenly by {num_processes()} processes: give a multiple of it."
            )


def check_tokens(models: Models, tokenizer: Any, texts: Iterable[Tensor], tasks: Sequence[Task]) -> None:
    """Raises InputError for an id in the texts or in what the tasks learn from that the model has no embedding of."""
    sequences = (ids for task in tasks for ids, _ in (*task.rows, *task.held_out))
    for ids in (*texts, *sequences):
        require_known_ids(ids, models.config, tokenizer)


def check_memory(models: Models, tasks: Sequence[Task]) -> None:
    """Raises ResourceError if what the tasks need at the least is not free; of several processes, each may hold a part."""
    if num_processes() > 1:
        return
    teacher_bytes = 0
    if models.teacher is not None and any(task.settings.kl > 0 for task in tasks):
        teacher_bytes = skeleton_bytes(build_skeleton(models.dense_config.config, models.dense_dtype))
    needed = {}
    for task in tasks:
        skeleton = build_skeleton(models.config, torch.float32 if task.method == "distill" else models.own_dtype)
        needed[task.method] = least_bytes(task, skeleton, models.vocab_size, teacher_bytes)
    require_memory(needed, models.device)
