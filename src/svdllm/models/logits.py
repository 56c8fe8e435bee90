"""Compares the logits of two models that should compute the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from svdllm.common.errors import SvdllmError

# In float32, products in another order differ by less than 1e-5; a wrong model differs by far more than this.
LEAST_TOLERANCE = 1e-3


@contextmanager
def full_precision() -> Iterator[None]:
    """Takes products of float32 in float32, whatever ``torch.set_float32_matmul_precision`` allows elsewhere.

    In TF32 or bfloat16 logits that should be equal differ by more than ``LEAST_TOLERANCE``.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # there is no one precision: it was set for each backend
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compare_logits(found: Tensor, expected: Tensor, refusal: Callable[[str], SvdllmError]) -> float:
    """Compares logits and returns the largest difference, as a share of the largest expected logit.

    Args:
        found, expected: logits of the same shape; the tolerance goes by the dtype of ``expected``.
        refusal: makes an error of "the logits differ by ...", which is raised beyond the tolerance.
    """
    difference = float((found - expected).abs().max() / expected.abs().max())
    allowed = tolerance_of(expected.dtype)
    if not difference <= allowed:  # also where it is NaN
        raise refusal(f"the logits differ by {difference:.1e} of the largest (at most {allowed:.0e} expected)")
    return difference


def tolerance_of(dtype: torch.dtype) -> float:
    """The largest difference that rounding explains: the square root of the dtype's precision, at least 1e-3."""
    return max(LEAST_TOLERANCE, torch.finfo(dtype).eps ** 0.5)


def loss_gradient(ids: Tensor, logits: Tensor) -> Tensor:
    """The gradient of the text's summed cross-entropy in the logits: ``softmax - one-hot`` where a token follows.

    Args:
        ids: tokens (``windows x seqlen``), on any device.
        logits: of these tokens (``windows x seqlen x vocabulary``).
    """
    following = ids[:, 1:, None].to(logits.device)
    gradient = logits.float().softmax(-1)
    gradient[:, :-1].scatter_add_(-1, following, torch.full_like(following, -1, dtype=gradient.dtype))
    gradient[:, -1] = 0
    return gradient.to(logits.dtype)
