"""Measures perplexity, with its standard error and its protocol.

Legend: B windows of a batch, T positions of a window, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdllm.common.errors import InputError, NumericalError
from svdllm.evaluation.windows import IGNORED, cut
from svdllm.models.limits import require_context, require_known_ids

TOKENS_PER_BATCH = 2048
CHUNK_ELEMENTS = 2**25  # logits that become losses at a time: 128 MiB in float32
BOS_TEXT = {
    True: "the tokenizer put BOS at the start of the text",
    False: "the tokenizer put no BOS at the start of the text",
    None: "whether the text begins with BOS is not known",
}


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """The record of one measurement of perplexity.

    perplexity: ``exp(mean_nll)``.
    stderr: standard error of the perplexity by the delta method, perplexity x standard error of the mean negative log
        likelihood, with windows as the independent units; None for a single window.
    mean_nll: mean negative log likelihood of the predicted tokens, in nats.
    num_tokens: predicted tokens.
    protocol: its name, see ``svdllm.evaluation.windows``; ``description`` describes it in words.
    begins_with_bos: whether the tokenizer put a BOS at the start of the text; None if this is not known.
    window_nll: mean negative log likelihood of each window, in nats; not in the dictionary.
    """

    perplexity: float
    stderr: float | None
    mean_nll: float
    num_tokens: int
    num_windows: int
    seqlen: int
    source: str
    protocol: str
    description: str
    begins_with_bos: bool | None
    seconds: float
    window_nll: tuple[float, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "window_nll"}

    def measured(self, token_ids: Tensor) -> Tensor:
        """The part of a text's ids (``num_tokens``) that the windows cover."""
        return token_ids.flatten()[: self.num_windows * self.seqlen]


def perplexity(
    model: nn.Module,
    token_ids: Tensor,
    *,
    seqlen: int,
    protocol: str = "windows",
    prefix_token_id: int | None = None,
    batch_size: int | None = None,
    max_windows: int | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    source: str = "token ids",
) -> Perplexity:
    """Measures the perplexity of a causal language model on a text, by a protocol of ``svdllm.evaluation.windows``.

    Losses are computed in float32 and summed in float64. The model runs in evaluation mode and without gradients, and
    gets its modes back.

    Args:
        token_ids: the text (num_tokens,) or (1, num_tokens); for the protocol ``windows`` also (num_windows, seqlen).
        prefix_token_id: the tokenizer's BOS, or its EOS where it has none. ``rolling`` needs it, and with it the record
            says whether the text begins with BOS.
        batch_size: number of windows; about 2,048 tokens by default.
        device: for the token ids; that of the input embeddings by default. The model is not moved.
        progress: called as ``progress(done, total)`` with numbers of windows.

    Raises:
        InputError: too little text, ``seqlen`` beyond the model's context, or ids beyond its vocabulary.
        NumericalError: a logit is not finite; names the window and the position.
    """
    started = time.perf_counter()
    all_windows = cut(token_ids, seqlen, protocol, prefix_token_id)
    _check(model, (token_ids, all_windows.inputs_NT), seqlen, batch_size, max_windows)
    windows = all_windows.first(max_windows)
    batch_size = batch_size or max(1, TOKENS_PER_BATCH // seqlen)
    device = device if device is not None else _input_device(model)
    total = len(windows)
    sums = []
    with evaluation_mode(model), torch.no_grad():
        for first in range(0, total, batch_size):
            ids_BT = windows.inputs_NT[first : first + batch_size].to(device)
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
            targets_BT = windows.targets_NT[first : first + batch_size].to(logits_BTV.device)
            sums.append(_summed_nll(logits_BTV, targets_BT, first).cpu())
            if progress is not None:
                progress(first + len(ids_BT), total)
    counts_N = (windows.targets_NT != IGNORED).sum(dim=1)
    first = windows.first_token
    bos = None if first is None or prefix_token_id is None else first == prefix_token_id
    used = f"{total} of {len(all_windows)} windows, {int(counts_N.max())} predictions each"
    return _record(
        torch.cat(sums),
        counts_N,
        seqlen=seqlen,
        source=source,
        protocol=protocol,
        description=f"{windows.description}; {used}; {BOS_TEXT[bos]}",
        begins_with_bos=bos,
        seconds=time.perf_counter() - started,
    )


def perplexity_text(value: float) -> str:
    """Three or four digits: fewer decimals the larger the number is."""
    if value >= 1e5:
        return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def _check(
    model: nn.Module, texts: Sequence[Tensor], seqlen: int, batch_size: int | None, max_windows: int | None
) -> None:
    check_counts(batch_size=batch_size, max_windows=max_windows)
    config = getattr(model, "config", None)
    require_context(config, seqlen)
    for ids in texts:
        require_known_ids(ids, config)


def check_counts(**counts: int | None) -> None:
    """Raises InputError for a count below 1."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, found {value}")


def _input_device(model: nn.Module) -> torch.device:
    find_embeddings: Any = getattr(model, "get_input_embeddings", lambda: model)
    first = next(find_embeddings().parameters(), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts every module in evaluation mode, and each back in its own mode afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _summed_nll(logits_BTV: Tensor, targets_BT: Tensor, first_window: int) -> Tensor:
    """Sums the negative log likelihood of the targets of each window: (B,) float64."""
    batch, length, vocabulary = logits_BTV.shape
    sums_B = torch.zeros(batch, dtype=torch.float64, device=logits_BTV.device)
    chunk = max(1, CHUNK_ELEMENTS // vocabulary)
    for row in range(batch):
        for start in range(0, length, chunk):
            logits_CV = logits_BTV[row, start : start + chunk].float()
            _require_finite(logits_CV, first_window + row, start)
            losses_C = F.cross_entropy(
                logits_CV, targets_BT[row, start : start + chunk], ignore_index=IGNORED, reduction="none"
            )
            sums_B[row] += losses_C.double().sum()
    return sums_B


def _require_finite(logits_CV: Tensor, window: int, start: int) -> None:
    finite_C = logits_CV.isfinite().all(dim=-1)
    if not finite_C.all():
        position = start + int((~finite_C).nonzero()[0])
        raise NumericalError(
            f"a logit of window {window} is not finite, first at position {position}: "
            "load the model in float32 or bfloat16 instead of float16, or look for NaN in its weights"
        )


def _record(sums_N: Tensor, counts_N: Tensor, **what: Any) -> Perplexity:
    """Makes the record of each window's summed negative log likelihood and number of predictions.

    The mean is a ratio of two sums over windows. Its standard error is that of the ratio by linearisation, with windows
    as independent units; for windows of equal size, this is the standard error of the mean of their means.
    """
    windows, tokens = len(sums_N), int(counts_N.sum())
    mean = sums_N.sum() / tokens
    value = mean.exp().item()
    residuals_N = sums_N - mean * counts_N
    variance = residuals_N.square().sum().item() * windows / max(windows - 1, 1)
    return Perplexity(
        perplexity=value,
        stderr=value * math.sqrt(variance) / tokens if windows > 1 else None,
        mean_nll=mean.item(),
        num_tokens=tokens,
        num_windows=windows,
        window_nll=tuple((sums_N / counts_N).tolist()),
        **what,
    )
