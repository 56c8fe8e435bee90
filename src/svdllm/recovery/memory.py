"""Bounds the memory of a training from below, before a model is loaded."""

from __future__ import annotations

import torch

from svdllm.common.memory import require_memory

# Copies of a micro-batch's logits in float32: the logits, their log-softmax and its gradient. A teacher adds two.
LOGITS, TEACHERS_LOGITS = 3, 2


def logits_bytes(num_tokens: int, vocab_size: int, *, with_teacher: bool = False) -> int:
    """Bytes of the logits that a micro-batch of ``num_tokens`` keeps, and of the teacher's."""
    return (LOGITS + with_teacher * TEACHERS_LOGITS) * num_tokens * vocab_size * 4


def require_memory_of_methods(needed: dict[str, int], device: torch.device, advice: str = "") -> None:
    """Raises ResourceError unless the largest need (bytes by method) is free.

    ``advice`` names methods that need less memory, in words that end with "; ".
    """
    method = max(needed, key=lambda name: needed[name])
    require_memory(
        needed[method],
        f"Weights, gradients, AdamW and logits of --method {method} need more than",
        device,
        f"Lower --micro-batch or --seqlen; {advice}or free some memory.",
    )
