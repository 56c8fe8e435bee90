"""A model that somebody else made, as a row beside ours: ``--methods name=FOLDER``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from svdllm.common.errors import InputError
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
        """Raises InputError unless its tokens are those of the dense model: perplexities could not be compared."""
        theirs = open_config(self.source, offline=options.offline, allow_quantized=True)
        ours = open_config(model, offline=options.offline, revision=options.revision)
        tokenizers = [source.load_tokenizer(options.offline) for source in (ours, theirs)]
        sizes = [len(tokenizer.get_vocab()) for tokenizer in tokenizers]
        same_vocabulary = tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
        if not same_vocabulary or len({tuple(tokenizer(SAMPLE)["input_ids"]) for tokenizer in tokenizers}) > 1:
            how = f"{sizes[1]:,} tokens, {model} has {sizes[0]:,}" if sizes[0] != sizes[1] else "other tokens or merges"
            raise InputError(
                f"Method {self.name}={self.source}: its tokenizer is not that of {model} ({how}). Perplexities over "
                "different tokens cannot be compared: give a model that was made from this one."
            )

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
