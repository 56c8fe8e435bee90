"""Checks chats (rows that are lists of messages) and renders them by the tokenizer's chat template.

A content is a text, or a list of parts such as ``{"type": "text", "text": ...}``. A template that reads parts gets
parts; another one gets their texts, joined by newlines. A message without a content comes from an assistant that only
calls tools.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from svdllm.common.errors import InputError, explaining
from svdllm.data.chat_template import require_default_template

Message = dict[str, Any]
# The beginning of a list of messages that was put into a string, as JSON or as Python writes it.
ENCODED_CHAT = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")
PROBE = "some text"


def decoded(value: Any, where: str) -> Any:
    """Decodes a list of messages that is written as JSON in a string; returns any other value as it is.

    Raises:
        InputError: the string begins like a list of messages, but is not JSON.
    """
    if not isinstance(value, str) or not ENCODED_CHAT.match(value):
        return value
    advice = "keep lists of messages as lists, or write them as JSON"
    with explaining(f"{where}: a text that begins like a list of messages is not valid JSON", advice):
        return json.loads(value)


def messages_of(value: Any, where: str) -> list[Message]:
    """Checks the messages of a chat, and removes null entries, which parquet adds.

    Raises:
        InputError: the value is not a list of messages, or a content is not text.
    """
    value = decoded(value, where)
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: expected a list of at least one message, found {_described(value)}")
    return [_checked(message, where) for message in value]


def render(messages: list[Message], where: str, tokenizer: Any, **settings: Any) -> str:
    """Renders a chat as text by the tokenizer's template.

    Raises:
        InputError: there is no template, or no default one among several; or the template refuses the messages, or
            leaves out their texts. The message begins with ``where``.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{where} is a chat, and the tokenizer has no chat template: "
            "give plain text in a column 'text', or the tokenizer of a chat model"
        )
    require_default_template(tokenizer, f"{where}: ")
    _refuse_lost_calls(messages, where, tokenizer)
    if any(isinstance(message.get("content"), list) for message in messages) and not _reads_parts(tokenizer):
        messages = [_joined(message) for message in messages]
    text = _by_template(messages, where, tokenizer, **settings)
    lines = list(_lines(messages))
    if lines and not any(line in text for line in lines):
        raise InputError(
            f"{where}: the tokenizer's chat template leaves out what the messages say: it is made for another form of "
            "content. Give plain text in a column 'text', or a tokenizer whose template takes texts"
        )
    return text


def _checked(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or "role" not in message or not {"content", "tool_calls"} & message.keys():
        raise InputError(
            f"{where}: a message must have 'role' and 'content', found {_described(message)}{_what_to_do(message)}"
        )
    message = {key: entry for key, entry in message.items() if entry is not None}
    if not isinstance(message.get("role"), str):
        raise InputError(f"{where}: the role of a message must be text, found {type(message.get('role')).__name__}")
    content = message.get("content")
    if content is None:
        if not message.get("tool_calls"):
            raise InputError(f"{where}: a message of the {message['role']} has no content and calls no tool: remove it")
        return message
    if isinstance(content, list):
        return message | {"content": [_checked_part(part, where) for part in content]}
    if not isinstance(content, str):
        raise InputError(
            f"{where}: the content of a message must be text, a list of parts of text, or null beside tool_calls, "
            f"found {type(content).__name__}"
        )
    return message


def _what_to_do(message: Any) -> str:
    if isinstance(message, dict) and {"from", "value"} <= message.keys():
        return ": rename 'from' to 'role' and 'value' to 'content', with the roles user and assistant"
    if isinstance(message, int):
        return ": token ids are taken from Python, as a tensor"
    return ""


def _checked_part(part: Any, where: str) -> Message:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise InputError(
            f"{where}: a content has a part of type {kind}, expected only parts like {{'type': 'text', 'text': ...}}: "
            "a language model reads no images or sound, leave such rows out"
        )
    return {"type": "text", "text": part["text"]}  # a template may take another key, even a null one, for an image


def _refuse_lost_calls(messages: list[Message], where: str, tokenizer: Any) -> None:
    if "tool_calls" in str(tokenizer.chat_template):  # one template, or several by name
        return
    if any(message.get("tool_calls") and not message.get("content") for message in messages):
        raise InputError(
            f"{where}: a message only calls tools, which the tokenizer's chat template does not know: leave such rows "
            "out, or use the tokenizer of a model with tools"
        )


def _reads_parts(tokenizer: Any) -> bool:
    """Whether the template renders a part of text as it renders the text itself."""
    contents = (PROBE, [{"type": "text", "text": PROBE}])
    try:
        as_text, as_part = (_by_template([{"role": "user", "content": c}], "a probe", tokenizer) for c in contents)
    except InputError:
        return False
    return as_text == as_part


def _joined(message: Message) -> Message:
    return message | {"content": "\n".join(_texts(message))} if "content" in message else message


def _texts(message: Message) -> list[str]:
    content = message.get("content", "")
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def _lines(messages: list[Message]) -> Iterator[str]:
    for message in messages:
        for text in _texts(message):
            yield from filter(None, map(str.strip, text.splitlines()))


def _by_template(messages: list[Message], where: str, tokenizer: Any, **settings: Any) -> str:
    with explaining(f"{where}: the tokenizer's chat template refuses the messages"):
        return tokenizer.apply_chat_template(messages, tokenize=False, **settings)


def _described(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with {', '.join(map(str, value)) or 'no keys'}"
    return "an empty list" if value == [] else type(value).__name__
