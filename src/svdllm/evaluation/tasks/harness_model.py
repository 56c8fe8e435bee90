"""Wraps a loaded model for the harness, and reports its progress. Slow to import, as the harness is."""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.models import huggingface
from transformers import PreTrainedModel

from svdllm.common.errors import InputError, explaining
from svdllm.common.progress import Reporter
from svdllm.models.limits import require_known_ids

TEXT_REFUSED = "the tokenizer cannot take a text of the tasks that begins with {!r}"
SHOWN = 60  # characters of a refused text

HFLM: Any = huggingface.HFLM  # its decorator hides its type


class HarnessModel(HFLM):
    """The harness's class for transformers models, with our checks and our progress."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, batch_size: int, reporter: Reporter, name: str) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
        self._reporter, self._name = reporter, name

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return self._counted("choices", super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return self._counted("texts", super().loglikelihood_rolling, requests)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return self._counted("answers", super().generate_until, requests)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None) -> Any:
        for _, context, continuation in requests:
            require_known_ids(torch.tensor([*context, *continuation]), self.config, self.tokenizer)
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise InputError(
                f"{self._name} takes {self.max_length} tokens, and a choice of the tasks has {longest}: they cannot be "
                "measured with this model. Leave the tasks with long choices out, or use a model with a longer context."
            )
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> Any:
        with explaining(TEXT_REFUSED.format(string[:SHOWN])):
            return super().tok_encode(string, *args, **kwargs)

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> Any:
        with explaining(TEXT_REFUSED.format(strings[0][:SHOWN])):
            return super().tok_batch_encode(strings, *args, **kwargs)

    def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
        require_known_ids(context, self.config, self.tokenizer)
        return super()._model_generate(context, *args, **kwargs)

    def _counted(self, kind: str, run: Any, requests: Any) -> Any:
        self.set_cache_hook(_Count(self._reporter, len(requests)))
        with self._reporter.stage(f"{self._name}: {kind}", len(requests)):
            return run(requests, disable_tqdm=True)


class _Count:
    """Counts answers; takes the place of the harness's cache, which receives each of them."""

    def __init__(self, reporter: Reporter, total: int) -> None:
        self._reporter, self._total, self._done = reporter, total, 0

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._done += 1
        self._reporter.advance(self._done, self._total)
