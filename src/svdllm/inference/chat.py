"""Chats with a model in memory: keeps the conversation, and yields answers as they are generated."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from svdllm.common.errors import InputError
from svdllm.data.chat_template import require_default_template
from svdllm.data.chats import render
from svdllm.data.tokens import encode
from svdllm.models.limits import require_context, require_known_ids, within_context

CONVERSATION = "the conversation"  # in messages about it


class Chat:
    """A conversation by the tokenizer's chat template; without one, each message is continued by itself.

    Args:
        model, tokenizer: a model and its own tokenizer.
        system: the first message, with instructions for the model.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 is greedy; None leaves sampling to the model's generation config.

    Raises:
        InputError: an argument is out of range; there is no chat template for ``system``, or no default one among
            several.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        temperature: float | None = None,
    ):
        if max_new_tokens < 1 or (temperature is not None and temperature < 0):
            raise InputError("max_new_tokens must be at least 1, the temperature at least 0.")
        require_default_template(tokenizer)
        self.has_template = bool(tokenizer.chat_template)
        if system is not None and not self.has_template:
            raise InputError("The tokenizer has no chat template, which would put the system's message somewhere.")
        self._model, self._tokenizer, self._max_new_tokens = model, tokenizer, max_new_tokens
        self._sampling = _sampling(temperature)
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Forgets the conversation, but not the system's message."""
        self.messages = list(self._system)

    def answer(self, message: str) -> Iterator[str]:
        """Yields the answer piece by piece as it is generated.

        Closing the iterator stops the generation; the conversation keeps the answer up to there.

        Raises:
            InputError: the conversation does not fit the model's context or template.
        """
        messages = [*self.messages, {"role": "user", "content": message}]
        inputs = self._encode(messages)
        streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, failed = Event(), []
        arguments = {
            **inputs,
            **self._sampling,
            "max_new_tokens": self._room(inputs["input_ids"]),
            "streamer": streamer,
        }
        worker = Thread(target=self._generate, args=(arguments, stop, failed))
        worker.start()
        pieces = []
        try:
            for piece in streamer:
                pieces.append(piece)
                yield piece
        finally:
            stop.set()
            worker.join()
            if self.has_template and not failed:
                self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
        if failed:
            raise failed[0]

    def _encode(self, messages: list[dict[str, str]]) -> dict[str, Tensor]:
        text = messages[-1]["content"]
        if self.has_template:
            text = render(messages, CONVERSATION, self._tokenizer, add_generation_prompt=True)
        ids = encode(text, self._tokenizer, CONVERSATION, add_special_tokens=not self.has_template)
        require_known_ids(ids, self._model.config, self._tokenizer)
        ids = ids.unsqueeze(0).to(self._model.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _room(self, input_ids: Tensor) -> int:
        config, length = self._model.config, input_ids.shape[1]
        if length == 0:
            raise InputError("The message is empty.")
        advice = "begin anew with /reset, or be shorter"
        require_context(config, length + 1, "The conversation with one token of an answer,", advice=advice)
        return within_context(config, length + self._max_new_tokens) - length

    def _generate(self, arguments: dict[str, Any], stop: Event, failed: list[Exception]) -> None:
        criteria = StoppingCriteriaList([_Stopped(stop)])
        try:
            self._model.generate(**arguments, stopping_criteria=criteria)  # type: ignore[operator]
        except Exception as error:
            failed.append(error)  # raised where the answer is read
            arguments["streamer"].end()


class _Stopped(StoppingCriteria):
    def __init__(self, stop: Event):
        self._stop = stop

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self._stop.is_set(), device=input_ids.device)


def _sampling(temperature: float | None) -> dict[str, Any]:
    if temperature is None:
        return {}
    return {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
