"""Documents -> token ids: rows are checked, chats rendered, and the text is tokenised as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svdllm.chat_template import require_default_template
from svdllm.data.sources import Documents
from svdllm.errors import InputError


def token_stream(documents: Documents, tokenizer: Any) -> Tensor:
    """The ids, (num_tokens,) int64, of all rows joined and tokenised once.

    Special tokens are the tokenizer's default for plain text, once for the whole stream; a chat template writes its
    own, so none are added to chats, which follow each other with nothing in between.

    Raises:
        InputError: a row is of the wrong type, or there is no text at all.
    """
    chat = len(documents.rows) > 0 and _is_chat(documents.rows[0])
    texts = [_as_text(row, index, chat, documents, tokenizer) for index, row in enumerate(documents.rows)]
    text = ("" if chat else documents.joiner).join(texts)
    if not text.strip():
        raise InputError(f"{documents.source} holds no text: give one with text")
    return _encode(text, tokenizer, add_special_tokens=not chat)


def document_tokens(documents: Documents, index: int, tokenizer: Any) -> Tensor:
    """The ids, (num_tokens,) int64, of one row by itself."""
    row = documents.rows[index]
    chat = _is_chat(row)
    return _encode(_as_text(row, index, chat, documents, tokenizer), tokenizer, add_special_tokens=not chat)


def _is_chat(row: Any) -> bool:
    return isinstance(row, list)


def _as_text(row: Any, index: int, chat: bool, documents: Documents, tokenizer: Any) -> str:
    where = f"{documents.source}, row {index}"
    if chat:
        return _render_chat(row, where, tokenizer)
    if not isinstance(row, str):
        raise InputError(f"{where}: expected text (str), found {type(row).__name__}")
    return row


def _render_chat(messages: Any, where: str, tokenizer: Any) -> str:
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: expected a list of at least one message, found {_describe(messages)}")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(f"{where}: a message must have 'role' and 'content', found {_describe(message)}")
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{where} is a chat, and the tokenizer has no chat template: "
            "give plain text in a column 'text', or the tokenizer of a chat model"
        )
    return apply_chat_template(messages, where, tokenizer)


def apply_chat_template(messages: list[Any], where: str, tokenizer: Any, **settings: Any) -> str:
    """The chat as text.

    Raises:
        InputError: there are several templates and no default one, or the template refuses the messages; says ``where``.
    """
    from jinja2 import TemplateError

    require_default_template(tokenizer, f"{where}: ")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **settings)
    except TemplateError as err:
        raise InputError(f"{where}: the tokenizer's chat template refuses the messages: {err}") from err


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with {', '.join(map(str, value)) or 'no keys'}"
    return "an empty list" if value == [] else type(value).__name__


def _encode(text: str, tokenizer: Any, *, add_special_tokens: bool) -> Tensor:
    settings = {} if add_special_tokens else {"add_special_tokens": False}
    # verbose=False: a stream longer than the model's context is meant here, the tokenizer would warn of it
    ids = tokenizer(text, verbose=False, return_attention_mask=False, **settings)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)
