"""A model that somebody else made, as a row beside ours: ``--methods name=FOLDER``.

It may be another model than the dense one, with a tokenizer of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from svdllm.common.run_options import RunOptions
from svdllm.comparison.fingerprint import fingerprint_of
from svdllm.comparison.variant import Variant
from svdllm.models.discover import discover
from svdllm.models.open import open_config
from svdllm.models.skeleton import build_skeleton

SAMPLE = "Don't split 3.14 or naïve 東京\n\tthe same way twice."


@dataclass(frozen=True, kw_only=True)
class Foreign(Variant):
    """A model that is only measured: a folder that ``from_pretrained`` loads, a hub id, or a GGUF file."""

    source: str
    offline: bool = False

    def ratios(self, asked: tuple[float, ...]) -> tuple[None]:
        return (None,)

    def check(self, model: str, ratios: tuple[float, ...], options: RunOptions) -> None:
        """Raises InputError or UnsupportedModelError unless there is such a model, with a tokenizer."""
        self.has_own_tokenizer(model, options)

    def has_own_tokenizer(self, model: str, options: RunOptions) -> bool:
        """Whether its tokens are not those of the dense model, so that perplexities by token do not compare."""
        theirs = open_config(self.source, offline=options.offline, allow_quantized=True)
        ours = open_config(model, offline=options.offline, revision=options.revision)
        tokenizers = [source.load_tokenizer(options.offline) for source in (ours, theirs)]
        if tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
            return True
        return len({tuple(tokenizer(SAMPLE)["input_ids"]) for tokenizer in tokenizers}) > 1

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        return fingerprint_of(self.source, offline=self.offline)

    def settings(self, ratio: float | None) -> dict[str, Any]:
        return super().settings(ratio) | {"made elsewhere": self.fingerprint}

    def make(self, model: str, ratio: float | None, folder: Path, analysis: Path, options: RunOptions) -> str:
        return self.source

    def describe(self) -> str:
        return f"made elsewhere: {self.source}\n"


def removed_share(model: str, dense_params: int, params: int, options: RunOptions) -> float | None:
    """The share of the linears' parameters that a model of ``params`` parameters lacks: the ratio it would have here.

    None if it is not between 0 and 1, as for a model with more parameters or fewer than its embeddings.
    """
    config = open_config(model, offline=options.offline, revision=options.revision).config
    linears = discover(build_skeleton(config)).num_target_params
    share = (dense_params - params) / linears
    return share if 0 <= share < 1 else None
