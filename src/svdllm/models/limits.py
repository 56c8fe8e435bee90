"""What a model can take: how many tokens at once, and which ids. Every command asks here before it works."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from svdllm.common.errors import InputError
from svdllm.models.open import context_length


def within_context(config: Any, default: int) -> int:
    """A number of tokens that nobody asked for: the default, or the model's context where that is smaller."""
    return min(default, context_length(config) or default)


def require_context(config: Any, tokens: int, name: str = "seqlen") -> None:
    """Raises InputError if windows are longer than the model can take; ``name`` is what set their length."""
    limit = context_length(config)
    if limit is not None and tokens > limit:
        raise InputError(
            f"{name} {tokens} is beyond the model's context of {limit} tokens: lower it to {limit} or less"
        )


def guard_embeddings(model: Any) -> None:
    """Makes a model refuse unknown ids by itself, where its texts come from outside; costs a look at every step's ids.

    On a GPU such an id would be an assertion of the device, after which the process can do nothing more.
    """

    def refuse(_: Any, arguments: tuple[Any, ...]) -> None:
        require_known_ids(arguments[0], model.config)

    model.get_input_embeddings().register_forward_pre_hook(refuse)


def require_known_ids(ids: Tensor, config: Any, tokenizer: Any = None) -> None:
    """Raises InputError for an id that the model has no embedding of; names its token where there is a tokenizer.

    A config without a vocabulary refuses no id but a negative one.
    """
    if not ids.numel():
        return
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text_config, "vocab_size", None)
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0:
        raise InputError(f"token ids must not be negative, found {lowest}: remove padding such as -100")
    if vocabulary is not None and highest >= vocabulary:
        token = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(highest)!r})"
        raise InputError(
            f"token id {highest}{token} is beyond the model's vocabulary of {vocabulary}: the tokenizer does not fit the "
            "model. Use the model's own tokenizer; where tokens were added to it, resize the embeddings with "
            "resize_token_embeddings and save the model again"
        )
