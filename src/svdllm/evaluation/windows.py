"""Cuts a text into the windows that perplexity is measured on, by a named protocol: the figure depends on it.

``windows``
    The protocol of GPTQ (arXiv 2210.17323) and SVD-LLM: the token stream is cut into windows of ``seqlen`` tokens
    without overlap and the remainder is dropped; the first token of a window has no context and is not predicted.
``rolling``
    lm-evaluation-harness's ``loglikelihood_rolling`` with ``max_length = seqlen``: every token is predicted once, the
    first one from a prefix token (BOS, else EOS). The last window is as long as the others and predicts what is left.

Legend: N windows, T positions of a window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from svdllm.common.errors import InputError

PROTOCOLS = ("windows", "rolling")
IGNORED = -100  # a target that is not predicted; cross_entropy ignores it by default

STREAM = "the whole text tokenised once, cut into windows of {seqlen} tokens without overlap, the remainder dropped"
GIVEN = "windows of {seqlen} tokens as given"
ROLLING = (
    "the whole text tokenised once, every token predicted once, the first from token {prefix}, in windows of {seqlen} "
    "tokens; the last one overlaps the one before it"
)


@dataclass(frozen=True)
class Windows:
    """Inputs of a model and the tokens to predict at each position, both (num_windows, T) int64.

    first_token: of the text; None for windows that the caller cut, which may start anywhere in it.
    """

    inputs_NT: Tensor
    targets_NT: Tensor
    description: str
    first_token: int | None

    def first(self, count: int | None) -> Windows:
        return replace(self, inputs_NT=self.inputs_NT[:count], targets_NT=self.targets_NT[:count])

    def __len__(self) -> int:
        return len(self.inputs_NT)


def cut(token_ids: Tensor, seqlen: int, protocol: str, prefix_token_id: int | None) -> Windows:
    """Cuts a stream (num_tokens,) or (1, num_tokens) into windows; windows (num_windows, seqlen) are kept.

    Raises:
        InputError: an unknown protocol, too little text, or ids that are not integers.
    """
    check_protocol(protocol, seqlen)
    if token_ids.is_floating_point() or token_ids.is_complex() or token_ids.dtype == torch.bool:
        raise InputError(f"token ids must be integers, found {token_ids.dtype}")
    if token_ids.ndim not in (1, 2):
        raise InputError(f"token ids must be 1-D or 2-D, found shape {tuple(token_ids.shape)}")
    given = token_ids.ndim == 2 and len(token_ids) != 1
    if given and protocol != "windows":
        raise InputError(f"the protocol {protocol} is for a text as one stream of tokens, found windows")
    if given and token_ids.shape[1] != seqlen:
        raise InputError(f"the windows given are {token_ids.shape[1]} tokens long, seqlen is {seqlen}: make them agree")
    if not given:
        token_ids = token_ids.flatten()
    return (
        _disjoint(token_ids, seqlen) if protocol == "windows" else _rolling(token_ids.long(), seqlen, prefix_token_id)
    )


def check_protocol(protocol: str, seqlen: int) -> None:
    """Raises InputError for an unknown protocol, or for windows too short to predict anything."""
    if protocol not in PROTOCOLS:
        raise InputError(f"unknown protocol '{protocol}': expected one of {', '.join(PROTOCOLS)}")
    least = 2 if protocol == "windows" else 1
    if seqlen < least:
        raise InputError(f"seqlen must be at least {least} to predict anything, found {seqlen}")


def prefix_token(tokenizer: Any) -> int | None:
    """The id that a text begins with: BOS, or EOS where the tokenizer has no BOS."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _disjoint(token_ids: Tensor, seqlen: int) -> Windows:
    count = token_ids.numel() // seqlen
    if count == 0:
        raise InputError(
            f"the text has {token_ids.numel()} tokens, one window needs {seqlen}: lower seqlen or give more text"
        )
    inputs_NT = token_ids.flatten()[: count * seqlen].view(count, seqlen).long()
    targets_NT = inputs_NT.roll(-1, dims=1)
    targets_NT[:, -1] = IGNORED
    if token_ids.ndim == 2:
        return Windows(inputs_NT, targets_NT, GIVEN.format(seqlen=seqlen), None)
    return Windows(inputs_NT, targets_NT, STREAM.format(seqlen=seqlen), int(token_ids[0]))


def _rolling(stream: Tensor, seqlen: int, prefix: int | None) -> Windows:
    if prefix is None:
        raise InputError("the protocol rolling needs a prefix token, and the tokenizer has neither BOS nor EOS")
    total = len(stream)
    if total == 0:
        raise InputError("the text has no tokens: give one with text")
    length = min(seqlen, total)
    inputs = torch.cat([stream.new_tensor([prefix]), stream[:-1]])
    full, rest = divmod(total, length)
    inputs_NT, targets_NT = (part[: full * length].view(full, length) for part in (inputs, stream))
    if rest:
        last = stream[-length:].clone()
        last[:-rest] = IGNORED
        inputs_NT = torch.cat([inputs_NT, inputs[None, -length:]])
        targets_NT = torch.cat([targets_NT, last[None]])
    return Windows(inputs_NT, targets_NT, ROLLING.format(seqlen=seqlen, prefix=prefix), int(stream[0]))
