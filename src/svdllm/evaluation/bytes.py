"""Perplexity by bytes of text, which models with different tokenizers can be compared by."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from svdllm.evaluation.perplexity import Perplexity


def bytes_per_token(ids: Tensor, tokenizer: Any) -> float:
    """Bytes of text (UTF-8) that a token stands for, in the mean over some ids (``num_tokens``)."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(text.encode("utf-8", "replace")) / len(ids)


def bits_per_byte(measured: Perplexity, bytes_of_token: float) -> dict[str, float | None]:
    """The bits that a model needs for a byte of text, with the standard error; None for a text without bytes."""
    if not bytes_of_token:
        return {"bits_per_byte": None, "bits_per_byte_stderr": None}
    bits = 1 / math.log(2) / bytes_of_token
    error = None if measured.stderr is None else measured.stderr / measured.perplexity * bits
    return {"bits_per_byte": measured.mean_nll * bits, "bits_per_byte_stderr": error}
