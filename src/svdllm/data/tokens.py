"""Turns documents into token ids: checks rows, renders chats, and tokenises the text as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svdllm.common.errors import InputError, explaining
from svdllm.data.chats import decoded, messages_of, render
from svdllm.data.sources import Documents


def token_stream(documents: Documents, tokenizer: Any) -> Tensor:
    """Joins all rows and tokenises them once: ids (num_tokens,) int64.

    Plain text gets the tokenizer's default special tokens, once for the whole stream. Chats get none, because a chat
    template writes its own; they follow each other without a joiner.

    Raises:
        InputError: a row is of the wrong type, cannot be tokenised, or there is no text at all.
    """
    chat = _holds_chats(documents)
    texts = [_as_text(documents, index, row, chat, tokenizer) for index, row in enumerate(documents.all_rows())]
    text = ("" if chat else documents.joiner).join(texts)
    if not text.strip():
        raise InputError(f"{documents.source} holds no text: give one with text")
    try:
        return encode(text, tokenizer, documents.source, add_special_tokens=not chat)
    except InputError:
        for index, row in enumerate(texts):
            encode(row, tokenizer, _place(documents, index), add_special_tokens=not chat)
        raise  # no row by itself is at fault


def document_tokens(documents: Documents, index: int, tokenizer: Any) -> Tensor:
    """Tokenises one row by itself: ids (num_tokens,) int64."""
    chat = _holds_chats(documents)
    text = _as_text(documents, index, documents.row(index), chat, tokenizer)
    return encode(text, tokenizer, _place(documents, index), add_special_tokens=not chat)


def encode(text: str, tokenizer: Any, where: str, *, add_special_tokens: bool) -> Tensor:
    """Tokenises a text, with the tokenizer's default special tokens or none: ids (num_tokens,) int64.

    Raises:
        InputError: the text has half a character, or the tokenizer cannot take it; begins with ``where``.
    """
    _require_whole_characters(text, where)
    settings = {} if add_special_tokens else {"add_special_tokens": False}
    advice = "leave this text out, or look whether the tokenizer's files are whole"
    with explaining(f"{where}: the tokenizer cannot take this text", advice):
        # verbose=False: else the tokenizer warns of a stream longer than the model's context, which is intended here
        ids = tokenizer(text, verbose=False, return_attention_mask=False, **settings)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _holds_chats(documents: Documents) -> bool:
    """Whether the rows are chats, by the name of the column, or else by the first row."""
    if documents.promises_chats or not len(documents.rows):
        return documents.promises_chats
    return isinstance(decoded(documents.row(0), _place(documents, 0)), list)


def _as_text(documents: Documents, index: int, row: Any, chat: bool, tokenizer: Any) -> str:
    where = _place(documents, index)
    if chat:
        return render(messages_of(row, where), where, tokenizer)
    if isinstance(decoded(row, where), list):
        raise InputError(
            f"{where}: expected text (str) as in row 0, found a list, as of a chat: keep texts and chats in files of "
            "their own"
        )
    if not isinstance(row, str):
        raise InputError(f"{where}: expected text (str), found {type(row).__name__}: {_what_to_do(row)}")
    _require_whole_characters(row, where)
    return row


def _what_to_do(row: Any) -> str:
    if row is None:
        return "the row is empty, remove it"
    if isinstance(row, bytes):
        return "decode the column to text"
    return "name the column of text after a ':'; token ids are taken from Python, as a tensor"


def _place(documents: Documents, index: int) -> str:
    return f"{documents.source}, row {index}"


def _require_whole_characters(text: str, where: str) -> None:
    """Raises InputError for half a surrogate pair, which cannot be encoded in UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start} is {text[error.start]!a}, half of a surrogate pair, which is not text "
            "(an emoji cut in two?): remove it, in Python with text.encode('utf-8', 'ignore').decode()"
        ) from error
