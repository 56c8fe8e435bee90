"""How much memory a training needs at the least, before anything is loaded."""

from __future__ import annotations

import torch

from svdllm.common.errors import ResourceError
from svdllm.common.memory import available_bytes

# Copies of a micro-batch's logits in float32: the logits, their log-softmax and its gradient; a teacher adds its own two.
LOGITS, TEACHERS_LOGITS = 3, 2


def logits_bytes(num_tokens: int, vocab_size: int, *, with_teacher: bool = False) -> int:
    """Bytes of the logits that a micro-batch of ``num_tokens`` keeps, and of the teacher's."""
    return (LOGITS + with_teacher * TEACHERS_LOGITS) * num_tokens * vocab_size * 4


def require_memory(needed: dict[str, int], device: torch.device, advice: str = "") -> None:
    """Raises ResourceError if what the methods need at the least (bytes by method) is not free.

    ``advice`` names what needs less memory, in words that end with "; ".
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    method = max(needed, key=lambda name: needed[name])
    if free is not None and needed[method] > free:
        raise ResourceError(
            f"--method {method} needs more than {needed[method] / 1e9:.2f} GB of memory (weights, gradients, AdamW, logits), "
            f"{free / 1e9:.2f} GB are free on {device}.",
            f"Lower --micro-batch or --seqlen; {advice}or free some memory.",
        )
