"""How much memory a training needs at the least, before anything is loaded."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from svdllm.common.errors import ResourceError
from svdllm.common.memory import available_bytes, skeleton_bytes
from svdllm.recovery.distill import open_for_training
from svdllm.recovery.stage import Task

ADAMW_BYTES = 4 + 4 + 4  # gradient and two moments of a trained number
# Of the logits of a micro-batch in float32: themselves, their log-softmax and its gradient; with a teacher its own two.
LOGITS, TEACHERS_LOGITS = 3, 2


def least_bytes(task: Task, skeleton: PreTrainedModel, vocab_size: int, teacher_bytes: int) -> int:
    """Weights, what AdamW keeps, the teacher and the logits; without the activations, so it is a lower bound.

    Args:
        skeleton: the compressed model without data, in the dtype that it is trained in.
        teacher_bytes: of the dense model's weights, 0 without one.
    """
    if task.method == "blockwise":
        return 0  # two blocks
    weights = skeleton_bytes(skeleton)
    longest = max(len(ids) for ids, _ in task.rows)
    logits = task.settings.sequences_at_once(task.method, 1) * longest * vocab_size * 4
    if task.method == "sequential-lora":
        return weights + LOGITS * logits
    open_for_training(skeleton, task.settings.train_norms)
    trained = sum(p.numel() for p in skeleton.parameters() if p.requires_grad)
    copies = LOGITS + (TEACHERS_LOGITS if teacher_bytes else 0)
    return weights + trained * ADAMW_BYTES + teacher_bytes + copies * logits


def require_memory(needed: dict[str, int], device: torch.device) -> None:
    """Raises ResourceError if what the methods need at the least (bytes by method) is not free."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    method = max(needed, key=lambda name: needed[name])
    if free is not None and needed[method] > free:
        others = "--method sequential-lora keeps no gradients of the factors, blockwise one block; " * (
            method == "distill"
        )
        raise ResourceError(
            f"--method {method} needs more than {needed[method] / 1e9:.2f} GB of memory (weights, gradients, AdamW, logits), "
            f"{free / 1e9:.2f} GB are free on {device}.",
            f"Lower --micro-batch or --seqlen; {others}or free some memory.",
        )
