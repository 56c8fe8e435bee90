"""Draws windows of tokens for calibration, and makes the stream of tokens for perplexity.

Calibration follows GPTQ (arXiv 2210.17323), as SVD-LLM does: the documents of a split are joined and tokenised once as
a whole, and the windows start at uniformly random tokens. Windows may overlap.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svdllm.common.errors import InputError
from svdllm.data.checks import check_source
from svdllm.data.sources import Documents, documents_of, documents_of_spec
from svdllm.data.specs import MixtureSpec, parse_spec
from svdllm.data.tokens import document_tokens, token_stream


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Windows of token ids.

    ids: (num_windows, seqlen) int64, on the CPU.
    source: description of the source, for reports.
    fingerprint: SHA-256 (hex) of the shape and the ids; differs with the tokenizer, the seed and the text.
    """

    ids: Tensor
    source: str
    fingerprint: str

    @property
    def num_tokens(self) -> int:
        return self.ids.numel()


def calibration_windows(
    source: str | Sequence[str] | Tensor | Any,
    tokenizer: Any,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    offline: bool = False,
) -> TokenWindows:
    """Draws ``samples`` windows of ``seqlen`` tokens from a source.

    ``source`` is a spec (grammar in ``svdllm.data.specs``), a list of str, a ``datasets.Dataset``, or a 2-D tensor of
    token ids, of which the first ``samples`` rows and ``seqlen`` columns are taken. The global random state is neither
    read nor changed. ``offline`` forbids every network call. With a tensor, ``tokenizer`` may be None.

    Raises:
        InputError: the source cannot be read, or is too short for one window.
    """
    for name, value in (("samples", samples), ("seqlen", seqlen)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, found {value}")
    check_source(source)
    if isinstance(source, Tensor):
        return _from_tensor(source, samples, seqlen)
    spec = parse_spec(source) if isinstance(source, str) else None
    if isinstance(spec, MixtureSpec):
        return _from_mixture(spec, tokenizer, samples, seqlen, seed, offline)
    documents = _documents(source, evaluation=False, offline=offline)
    return _finish(_draw(documents, tokenizer, samples, seqlen, seed), documents.source)


def evaluation_tokens(source: str | Sequence[str] | Any, tokenizer: Any, *, offline: bool = False) -> Tensor:
    """Tokenises the whole evaluation text of a source: ids (num_tokens,) int64.

    Named sets, and hub datasets without a named split, give their test split. c4 gives the first 1,100 documents of the
    first validation file, of which GPTQ keeps 256 windows (``max_windows=256`` in ``perplexity``). Files are taken
    whole.

    Raises:
        InputError: the source cannot be read, or is a mixture or a tensor.
    """
    if isinstance(source, Tensor):
        raise InputError("evaluation_tokens turns text into token ids, found a tensor: hand it to perplexity directly")
    check_source(source)
    if isinstance(source, str) and isinstance(parse_spec(source), MixtureSpec):
        raise InputError(f"'{source}' is a mixture, which has no perplexity of its own: evaluate its parts one by one")
    return token_stream(_documents(source, evaluation=True, offline=offline), tokenizer)


def mixture_counts(weights: Sequence[float], total: int) -> list[int]:
    """Splits ``total`` in proportion to ``weights``, which sum to 1, by largest remainder; ties go to the first."""
    shares = [weight * total for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - shares[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _documents(source: Any, *, evaluation: bool, offline: bool) -> Documents:
    if isinstance(source, str):
        return documents_of_spec(parse_spec(source), evaluation=evaluation, offline=offline)
    return documents_of(source)


def _from_tensor(ids: Tensor, samples: int, seqlen: int) -> TokenWindows:
    found, length = ids.shape
    if found < samples or length < seqlen:
        raise InputError(
            f"the tensor holds {found} windows of {length} tokens, needed are {samples} of {seqlen}: "
            "lower samples or seqlen, or give more"
        )
    return _finish(ids[:samples, :seqlen], f"tensor {found} x {length}")


def _from_mixture(
    spec: MixtureSpec, tokenizer: Any, samples: int, seqlen: int, seed: int, offline: bool
) -> TokenWindows:
    counts = mixture_counts([weight for _, _, weight in spec.parts], samples)
    windows, descriptions = [], []
    for index, ((part, _, _), count) in enumerate(zip(spec.parts, counts, strict=True)):
        documents = documents_of_spec(part, evaluation=False, offline=offline)
        windows.append(_draw(documents, tokenizer, count, seqlen, part_seed(seed, index)))
        descriptions.append(f"{count} x {documents.source}")
    return _finish(torch.cat(windows), " + ".join(descriptions))


def part_seed(seed: int, index: int) -> int:
    """The seed of part ``index`` of a mixture: parts draw independently, so each keeps its draw when others change."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8], "little") >> 1


def _draw(documents: Documents, tokenizer: Any, samples: int, seqlen: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if documents.per_document:
        return _document_windows(documents, tokenizer, samples, seqlen, generator)
    stream = token_stream(documents, tokenizer)
    if len(stream) < seqlen:
        raise InputError(
            f"{documents.source} holds {len(stream)} tokens, one window needs {seqlen}: "
            f"lower seqlen to {len(stream)} or less, or give more text"
        )
    starts = torch.randint(len(stream) - seqlen + 1, (samples,), generator=generator)
    return (
        torch.stack([stream[start : start + seqlen] for start in starts.tolist()]) if samples else _no_windows(seqlen)
    )


def _document_windows(
    documents: Documents, tokenizer: Any, samples: int, seqlen: int, generator: torch.Generator
) -> Tensor:
    """Draws one random window from each of ``samples`` random documents longer than ``seqlen``."""
    order = torch.randperm(len(documents.rows), generator=generator).tolist()
    windows = []
    for ids in itertools.islice(_long_documents(documents, tokenizer, seqlen, order), samples):
        start = int(torch.randint(len(ids) - seqlen + 1, (1,), generator=generator))
        windows.append(ids[start : start + seqlen])
    return torch.stack(windows) if windows else _no_windows(seqlen)


def _long_documents(documents: Documents, tokenizer: Any, seqlen: int, order: list[int]) -> Iterator[Tensor]:
    """Yields the ids of the documents longer than ``seqlen``, in ``order``, and begins again after the last."""
    found: list[Tensor] = []
    longest = 0
    for index in order:
        ids = document_tokens(documents, index, tokenizer)
        longest = max(longest, len(ids))
        if len(ids) > seqlen:
            found.append(ids)
            yield ids
    if not found:
        raise InputError(
            f"no document of {documents.source} is longer than a window: the longest has {longest} tokens, "
            f"needed are more than {seqlen}: lower seqlen below {longest}"
        )
    yield from itertools.cycle(found)


def _no_windows(seqlen: int) -> Tensor:
    return torch.empty(0, seqlen, dtype=torch.int64)


def _finish(ids: Tensor, source: str) -> TokenWindows:
    ids = ids.detach().to("cpu", torch.int64).contiguous()
    digest = hashlib.sha256(f"{tuple(ids.shape)}".encode())
    digest.update(ids.numpy().astype("<i8", copy=False).data)
    return TokenWindows(ids=ids, source=source, fingerprint=digest.hexdigest())
