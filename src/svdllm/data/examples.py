"""Makes training examples of instructions with answers, of chats, or of plain text cut into windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svdllm.common.errors import InputError
from svdllm.data.chats import messages_of, render
from svdllm.data.files import CHAT_FIELD
from svdllm.data.sources import documents_of_spec, rows_of_spec
from svdllm.data.specs import DocsSpec, MixtureSpec, NamedSet, parse_spec
from svdllm.data.tokens import encode, token_stream

TEMPLATES = ("alpaca", "chat")
NO_LABEL = -100  # losses of transformers ignore it
INSTRUCTION = ("instruction", "output")
COMPLETION = ("prompt", "completion")
# The prompt of the Alpaca data, by which models are compared.
ALPACA_HEAD = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
)
ALPACA_INPUT = ", paired with an input that provides further context"


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Training examples.

    rows: (input_ids, labels), both (length,) int64 and no longer than ``seqlen``; labels are not shifted.
    kind: instructions, chats or text.
    left_out: number of examples without a label within ``seqlen``.
    """

    rows: list[tuple[Tensor, Tensor]]
    source: str
    kind: str
    left_out: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) for ids, _ in self.rows)


def training_examples(
    source: str,
    tokenizer: Any,
    *,
    seqlen: int,
    template: str = "alpaca",
    completions_only: bool = True,
    packing: bool = False,
    evaluation: bool = False,
    offline: bool = False,
) -> Examples:
    """Makes the examples of a source, in its order.

    Rows with ``instruction`` and ``output`` (and ``input``), or ``prompt`` and ``completion``, become a prompt by the
    template and an answer. Rows with ``messages`` are chats, whose last message is the answer. All else is text: one
    stream, cut into windows of ``seqlen`` without overlap. With ``evaluation``, the examples come from the evaluation
    split of a data set, where it has one.

    Raises:
        InputError: the source cannot be read, a row lacks a field, or nothing is left to train on.
    """
    refuse_mixture(source)
    spec = parse_spec(source)
    rows = [] if isinstance(spec, NamedSet | DocsSpec) else rows_of_spec(spec, evaluation=evaluation, offline=offline)
    kind = _kind_of(rows)
    if kind is None:
        return _windows(spec, tokenizer, seqlen, evaluation, offline)
    places = (f"{source}, row {index}" for index in range(len(rows)))
    encoded = [
        _encoded(_pair(row, where, template, tokenizer), where, tokenizer, completions_only)
        for row, where in zip(rows, places, strict=True)
    ]
    if packing:
        kept = list(_packed(encoded, seqlen))
    else:
        kept = [(ids[:seqlen], labels[:seqlen]) for ids, labels in encoded]
    kept = [(ids, labels) for ids, labels in kept if bool((labels[1:] != NO_LABEL).any())]
    if not kept:
        raise InputError(
            f"{source}: no answer begins within {seqlen} tokens, so there is nothing to learn; raise seqlen, or train "
            "on everything"
        )
    left_out = 0 if packing else len(encoded) - len(kept)
    return Examples(rows=kept, source=f"{source} ({len(rows)} rows)", kind=kind, left_out=left_out)


def refuse_mixture(source: str) -> None:
    """Raises InputError for a mixture, which cannot give whole examples."""
    if isinstance(parse_spec(source), MixtureSpec):
        raise InputError(f"'{source}' is a mixture; training by examples takes one source at a time")


def holds_examples(source: str, offline: bool = False) -> bool:
    """Whether a source has instructions or chats rather than plain text."""
    spec = parse_spec(source)
    if isinstance(spec, MixtureSpec | NamedSet | DocsSpec):
        return False
    return _kind_of(rows_of_spec(spec, evaluation=False, offline=offline)) is not None


def padded(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Makes a batch of rows of unequal length, padded on the right; attention and labels leave the padding out."""
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": NO_LABEL}
    batch = {
        name: torch.stack(
            [torch.nn.functional.pad(row[name], (0, longest - len(row[name])), value=value) for row in rows]
        )
        for name, value in fill.items()
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return batch | {"attention_mask": (torch.arange(longest) < lengths.unsqueeze(1)).long()}


class _Pair(NamedTuple):
    """Prompt and answer as text; a chat has its special tokens in the text."""

    prompt: str
    answer: str
    chat: bool = False


def _kind_of(rows: Sequence[dict[str, Any]]) -> str | None:
    if not rows:
        return None
    fields = set(rows[0])
    if set(INSTRUCTION) <= fields or set(COMPLETION) <= fields:
        return "instructions"
    return "chats" if CHAT_FIELD in fields else None


def _pair(row: dict[str, Any], where: str, template: str, tokenizer: Any) -> _Pair:
    if CHAT_FIELD in row:
        messages = messages_of(row[CHAT_FIELD], where)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise InputError(f"{where}: expected messages of which the last is the assistant's")
        return _chat_pair(messages, where, tokenizer)
    asked, answer = (_text_in(row, field, where) for field in (INSTRUCTION if "instruction" in row else COMPLETION))
    given = "" if row.get("input") is None else _text_in(row, "input", where)
    if template == "chat":
        asked = f"{asked}\n\n{given}" if given else asked
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return _chat_pair(messages, where, tokenizer)
    if "instruction" not in row:
        return _Pair(asked, answer)
    context = f"\n\n### Input:\n{given}" if given else ""
    head = ALPACA_HEAD.format(ALPACA_INPUT if given else "")
    return _Pair(f"{head}\n\n### Instruction:\n{asked}{context}\n\n### Response:\n", answer)


def _text_in(row: dict[str, Any], field: str, where: str) -> str:
    if not isinstance(row.get(field), str):
        raise InputError(f"{where}: expected text in {field!r}, found {type(row.get(field)).__name__}")
    return row[field]


def _chat_pair(messages: list[Any], where: str, tokenizer: Any) -> _Pair:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{where}: the tokenizer has no chat template; use --template alpaca")
    prompt = render(messages[:-1], where, tokenizer, add_generation_prompt=True)
    whole = render(messages, where, tokenizer)
    if not whole.startswith(prompt):
        raise InputError(
            f"{where}: with this chat template the prompt is not the beginning of the whole chat, so the answer cannot "
            "be told apart; use --template alpaca, or --train-on everything with plain text"
        )
    return _Pair(prompt, whole[len(prompt) :], chat=True)


def _encoded(pair: _Pair, where: str, tokenizer: Any, completions_only: bool) -> tuple[Tensor, Tensor]:
    """Ids and labels of prompt and answer, which are tokenised apart so that the border is exact."""
    head = encode(pair.prompt, tokenizer, where, add_special_tokens=not pair.chat).tolist()
    tail = encode(pair.answer, tokenizer, where, add_special_tokens=False).tolist()
    eos = tokenizer.eos_token_id
    if eos is not None and not pair.chat:
        head = head[:-1] if head[-1:] == [eos] else head  # a tokenizer that ends every text
        tail = [*tail, eos]
    ids = torch.tensor([*head, *tail], dtype=torch.int64)
    labels = ids.clone()
    if completions_only:
        labels[: len(head)] = NO_LABEL
    return ids, labels


def _packed(encoded: Sequence[tuple[Tensor, Tensor]], seqlen: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Joins the examples and cuts them into rows of exactly ``seqlen``; the remainder is dropped."""
    ids = torch.cat([ids for ids, _ in encoded])
    labels = torch.cat([labels for _, labels in encoded])
    full = len(ids) // seqlen * seqlen
    yield from zip(ids[:full].split(seqlen), labels[:full].split(seqlen), strict=True)


def _windows(spec: Any, tokenizer: Any, seqlen: int, evaluation: bool, offline: bool) -> Examples:
    documents = documents_of_spec(spec, evaluation=evaluation, offline=offline)
    stream = token_stream(documents, tokenizer)
    full = len(stream) // seqlen * seqlen
    if not full:
        raise InputError(f"{documents.source} holds {len(stream)} tokens, one window needs {seqlen}: lower seqlen")
    windows = stream[:full].split(seqlen)
    return Examples(rows=[(window, window) for window in windows], source=documents.source, kind="text")
