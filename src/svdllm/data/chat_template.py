"""Checks the chat templates of a tokenizer: it has one, or several with names, of which ``default`` is used."""

from __future__ import annotations

from typing import Any

from svdllm.common.errors import InputError

DEFAULT = "default"


def has_chat_template(tokenizer: Any) -> bool:
    """Whether a tokenizer can render a chat without the name of a template."""
    template = getattr(tokenizer, "chat_template", None)
    return bool(template.get(DEFAULT) if isinstance(template, dict) else template)


def require_default_template(tokenizer: Any, where: str = "") -> None:
    """Raises InputError, beginning with ``where``, if all templates have names and none is ``default``."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict) and template and not template.get(DEFAULT):
        raise InputError(
            f"{where}The tokenizer has chat templates named {', '.join(sorted(template))}, but none named {DEFAULT}, "
            "which chats are written with. Save one of them beside the tokenizer as chat_template.jinja."
        )
