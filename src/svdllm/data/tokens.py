"""Documents -> token ids: rows are checked, chats rendered, and the text is tokenised as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svdllm.common.errors import InputError, explaining
from svdllm.data.chats import decoded, messages_of, render
from svdllm.data.sources import Documents


def token_stream(documents: Documents, tokenizer: Any) -> Tensor:
    """The ids, (num_tokens,) int64, of all rows joined and tokenised once.

    Special tokens are the tokenizer's default for plain text, once for the whole stream; a chat template writes its
    own, so none are added to chats, which follow each other with nothing in between.

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
    """The ids, (num_tokens,) int64, of one row by itself."""
    chat = _holds_chats(documents)
    text = _as_text(documents, index, documents.row(index), chat, tokenizer)
    return encode(text, tokenizer, _place(documents, index), add_special_tokens=not chat)


def encode(text: str, tokenizer: Any, where: str, *, add_special_tokens: bool) -> Tensor:
    """The ids, (num_tokens,) int64, of a text; special tokens are the tokenizer's default, or none.

    Raises:
        InputError: a character is cut in two, or the tokenizer cannot take the text; says ``where``.
    """
    _require_whole_characters(text, where)
    settings = {} if add_special_tokens else {"add_special_tokens": False}
    advice = "leave this text out, or look whether the tokenizer's files are whole"
    with explaining(f"{where}: the tokenizer cannot take this text", advice):
        # verbose=False: a stream longer than the model's context is meant here, the tokenizer would warn of it
        ids = tokenizer(text, verbose=False, return_attention_mask=False, **settings)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _holds_chats(documents: Documents) -> bool:
    """By the name of the column, or by the first row: the others must be like it."""
    if documents.promises_chats or not len(documents.rows):
        return documents.promises_chats
    return isinstance(decoded(documents.row(0), _place(documents, 0)), list)


def _as_text(documents: Documents, index: int, row: Any, chat: bool, tokenizer: Any) -> str:
    where = _place(documents, index)
    if chat:
        return render(messages_of(row, where), where, tokenizer)
    if isinstance(decoded(row, where), list):
        raise InputError(
            f"{where}: expected text (str) as in row 0, found a list, as of a chat: keep texts and chats in files of their own"
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
    """Raises InputError for half a surrogate pair, of which no UTF-8 and no token can be made."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start} is {text[error.start]!a}, half of a surrogate pair, which is no text "
            "(an emoji cut in two?): remove it, in Python with text.encode('utf-8', 'ignore').decode()"
        ) from error
