"""Checks what a model can take: how many tokens at once, and which ids."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from svdllm.common.errors import InputError


def context_length(config: Any) -> int | None:
    """The most tokens that a model takes at once; None where its config does not say (XLNet says -1)."""
    longest = getattr(text_config(config), "max_position_embeddings", None)
    return longest if longest is not None and longest > 0 else None


def within_context(config: Any, default: int) -> int:
    """A default number of tokens, or the model's context where that is smaller."""
    return min(default, context_length(config) or default)


def require_context(
    config: Any, tokens: int, what: str = "seqlen", *, model: str = "the model", advice: str | None = None
) -> None:
    """Raises InputError if a text is longer than the model's context.

    Args:
        what: what has so many tokens, to begin the message with.
        advice: what to do; to lower ``what`` by default.
    """
    limit = context_length(config)
    if limit is not None and tokens > limit:
        advice = advice or f"lower it to {limit} or less"
        raise InputError(f"{what} {tokens} is beyond {model}'s context of {limit} tokens: {advice}")


def guard_embeddings(model: Any) -> None:
    """Makes a model refuse unknown ids by itself, where texts come from outside; each forward pass looks at its ids.

    On a GPU such an id would be an assertion of the device, after which the process can do nothing more.
    """

    def refuse(_: Any, arguments: tuple[Any, ...]) -> None:
        require_known_ids(arguments[0], model.config)

    model.get_input_embeddings().register_forward_pre_hook(refuse)


def require_known_ids(ids: Tensor, config: Any, tokenizer: Any = None) -> None:
    """Raises InputError for an id that the model has no embedding of; names its token where there is a tokenizer.

    A config without a vocabulary refuses negative ids only.
    """
    if not ids.numel():
        return
    vocabulary = getattr(text_config(config), "vocab_size", None)
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0:
        raise InputError(f"token ids must not be negative, found {lowest}: remove padding such as -100")
    if vocabulary is not None and highest >= vocabulary:
        token = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(highest)!r})"
        raise InputError(
            f"token id {highest}{token} is beyond the model's vocabulary of {vocabulary}: the tokenizer does not fit "
            "the model. Use the model's own tokenizer; where tokens were added to it, resize the embeddings with "
            "resize_token_embeddings and save the model again"
        )


def text_config(config: Any) -> Any:
    """The part of a config that describes the language model; the whole where there are no parts."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config
