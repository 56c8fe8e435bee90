"""Perplexity, with its standard error and the protocol that it was taken by.

Legend: B windows of a batch, T positions of a window, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdllm.checkpoint import load_model
from svdllm.data import check_source, evaluation_tokens
from svdllm.errors import InputError, NumericalError
from svdllm.plan import resolve_device, resolve_dtype
from svdllm.progress import Reporter
from svdllm.source import open_config

TOKENS_PER_BATCH = 2048
CHUNK_ELEMENTS = 2**25  # float32 logits that are turned into losses at a time: 128 MiB
STREAM = "the whole text tokenised once, cut into windows of {seqlen} tokens without overlap, the remainder dropped"
GIVEN = "windows of {seqlen} tokens as given"
PROTOCOL = (
    "{windows}; {used} of {total} windows, {predictions} predictions each; "
    "special tokens as the tokenizer adds them, once at the start of the text"
)


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """The record of one measurement.

    perplexity: ``exp(mean_nll)``.
    stderr: standard error of the perplexity by the delta method, perplexity x standard error of the mean negative log
        likelihood, with windows as the independent units; None for a single window.
    mean_nll: mean negative log likelihood of the predicted tokens, in nats.
    num_tokens: predicted tokens.
    """

    perplexity: float
    stderr: float | None
    mean_nll: float
    num_tokens: int
    num_windows: int
    seqlen: int
    source: str
    protocol: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def perplexity(
    model: nn.Module,
    token_ids: Tensor,
    *,
    seqlen: int,
    batch_size: int | None = None,
    max_windows: int | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    source: str = "token ids",
) -> Perplexity:
    """Perplexity of a causal language model on a text, by the protocol of GPTQ (arXiv 2210.17323) and SVD-LLM.

    ``token_ids`` is the text as (num_tokens,) or (1, num_tokens), cut into windows of ``seqlen`` without overlap, the
    remainder dropped; or windows as (num_windows, seqlen). Each window yields ``seqlen - 1`` predictions. The losses
    are computed in float32 and summed in float64. ``batch_size`` is in windows, by default about 2,048 tokens.
    ``device`` is where the token ids go, by default where the input embeddings are; the model is not moved.
    ``progress(done, total)`` is called with window counts. The model runs in evaluation mode and without gradients,
    and gets its modes back.

    Raises:
        InputError: too little text, ``seqlen`` beyond the model's context, or ids beyond its vocabulary.
        NumericalError: a logit is not finite; names the window and the position.
    """
    started = time.perf_counter()
    all_windows_NT = _windows(token_ids, seqlen)
    _check(model, all_windows_NT, batch_size, max_windows)
    windows_NT = all_windows_NT[:max_windows]
    batch_size = batch_size or max(1, TOKENS_PER_BATCH // seqlen)
    device = device if device is not None else _input_device(model)
    total = len(windows_NT)
    sums = []
    with evaluation_mode(model), torch.no_grad():
        for first in range(0, total, batch_size):
            ids_BT = windows_NT[first : first + batch_size].to(device, torch.int64)
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
            sums.append(_summed_nll(logits_BTV, ids_BT, first).cpu())
            if progress is not None:
                progress(first + len(ids_BT), total)
    protocol = PROTOCOL.format(
        windows=(GIVEN if _is_windows(token_ids) else STREAM).format(seqlen=seqlen),
        used=total,
        total=len(all_windows_NT),
        predictions=seqlen - 1,
    )
    return _record(torch.cat(sums) / (seqlen - 1), seqlen, source, protocol, time.perf_counter() - started)


def _is_windows(token_ids: Tensor) -> bool:
    return token_ids.ndim == 2 and len(token_ids) != 1


def _windows(token_ids: Tensor, seqlen: int) -> Tensor:
    if seqlen < 2:
        raise InputError(f"seqlen must be at least 2 to predict anything, found {seqlen}")
    if token_ids.is_floating_point() or token_ids.is_complex() or token_ids.dtype == torch.bool:
        raise InputError(f"token ids must be integers, found {token_ids.dtype}")
    if token_ids.ndim == 2 and not _is_windows(token_ids):
        token_ids = token_ids[0]
    if token_ids.ndim == 2:
        if token_ids.shape[1] != seqlen:
            raise InputError(
                f"the windows given are {token_ids.shape[1]} tokens long, seqlen is {seqlen}: make them agree"
            )
        windows = token_ids
    elif token_ids.ndim == 1:
        count = len(token_ids) // seqlen
        windows = token_ids[: count * seqlen].view(count, seqlen)
    else:
        raise InputError(f"token ids must be 1-D or 2-D, found shape {tuple(token_ids.shape)}")
    if len(windows) == 0:
        raise InputError(
            f"the text has {token_ids.numel()} tokens, one window needs {seqlen}: lower seqlen or give more text"
        )
    return windows


def _check(model: nn.Module, windows_NT: Tensor, batch_size: int | None, max_windows: int | None) -> None:
    for name, value in (("batch_size", batch_size), ("max_windows", max_windows)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, found {value}")
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    seqlen = windows_NT.shape[1]
    if limit is not None and seqlen > limit:
        raise InputError(
            f"seqlen {seqlen} is beyond the model's context of {limit} tokens: lower it to {limit} or less"
        )
    vocabulary = getattr(config, "vocab_size", None)
    lowest, highest = int(windows_NT.min()), int(windows_NT.max())
    if lowest < 0:
        raise InputError(f"token ids must not be negative, found {lowest}: remove padding such as -100")
    if vocabulary is not None and highest >= vocabulary:
        raise InputError(
            f"token id {highest} is beyond the model's vocabulary of {vocabulary}: "
            "the tokenizer does not fit the model, use the model's own"
        )


def _input_device(model: nn.Module) -> torch.device:
    find_embeddings: Any = getattr(model, "get_input_embeddings", lambda: model)
    first = next(find_embeddings().parameters(), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and each back in its own mode afterwards (they need not all be the same)."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _summed_nll(logits_BTV: Tensor, ids_BT: Tensor, first_window: int) -> Tensor:
    """Negative log likelihood of tokens 1..T-1 of every window, summed: (B,) float64."""
    batch, length, vocabulary = logits_BTV.shape
    sums_B = torch.zeros(batch, dtype=torch.float64, device=logits_BTV.device)
    chunk = max(1, CHUNK_ELEMENTS // vocabulary)
    for row in range(batch):
        targets_T = ids_BT[row, 1:].to(logits_BTV.device)
        for start in range(0, length, chunk):
            logits_CV = logits_BTV[row, start : start + chunk].float()
            _require_finite(logits_CV, first_window + row, start)
            wanted_C = targets_T[start : start + chunk]
            losses_C = F.cross_entropy(logits_CV[: len(wanted_C)], wanted_C, reduction="none")
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


def _record(nll_N: Tensor, seqlen: int, source: str, protocol: str, seconds: float) -> Perplexity:
    """``nll_N``: mean negative log likelihood of each window; windows are of equal size."""
    count = len(nll_N)
    mean = nll_N.mean()
    value = mean.exp().item()
    stderr = value * (nll_N.std(correction=1) / math.sqrt(count)).item() if count > 1 else None
    return Perplexity(
        perplexity=value,
        stderr=stderr,
        mean_nll=mean.item(),
        num_tokens=count * (seqlen - 1),
        num_windows=count,
        seqlen=seqlen,
        source=source,
        protocol=protocol,
        seconds=seconds,
    )


@dataclass(frozen=True, kw_only=True)
class ModelPerplexity:
    """The perplexity of one model on one text, with the size of the model."""

    model: str
    text: str
    params: int
    weight_bytes: int
    perplexity: Perplexity

    def to_dict(self) -> dict[str, Any]:
        sizes = {"model": self.model, "text": self.text, "params": self.params, "weight_bytes": self.weight_bytes}
        return sizes | self.perplexity.to_dict()


def evaluate_models(
    models: Sequence[str],
    texts: Sequence[str],
    *,
    seqlen: int,
    max_windows: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    offline: bool = False,
    reporter: Reporter | None = None,
) -> list[ModelPerplexity]:
    """Perplexity of every model on every text, by text and then by model; one model is in memory at a time.

    ``models`` are hub ids, folders (compressed or not) or GGUF files; each is measured with its own tokenizer. All of
    them, and the texts, are looked at before the first one is loaded.

    Raises:
        InputError, UnsupportedModelError, CheckpointError: a model or text cannot be used; names it.
        NumericalError: a logit is not finite.
    """
    reporter = reporter or Reporter()
    for text in texts:
        check_source(text)
    place = resolve_device(device)
    opened = [open_config(model, offline=offline) for model in models]
    rows: dict[tuple[int, int], ModelPerplexity] = {}
    for number, (name, source) in enumerate(zip(models, opened, strict=True)):
        tokenizer = source.load_tokenizer(offline)
        ids = [evaluation_tokens(text, tokenizer, offline=offline) for text in texts]
        with reporter.stage(f"load {Path(name).name}", 1):
            model = load_model(name, dtype=resolve_dtype(dtype, place, source.dtype), local_files_only=offline)
            model.to(place)  # type: ignore[arg-type]
        for position, text in enumerate(texts):
            with reporter.stage(f"eval {Path(name).name}", 1):
                measured = perplexity(
                    model,
                    ids[position],
                    seqlen=seqlen,
                    max_windows=max_windows,
                    batch_size=batch_size,
                    progress=reporter.advance,
                    source=text,
                )
            rows[position, number] = ModelPerplexity(
                model=name,
                text=text,
                params=model.num_parameters(),
                weight_bytes=source.weight_bytes,
                perplexity=measured,
            )
        del model
    return [rows[key] for key in sorted(rows)]
