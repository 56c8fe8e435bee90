"""What the steps of ``gpu_suite.py`` share: the device, shapes, random models, and a tokenizer made on the spot."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from decomposition import summary
from inference_gpu import llama_7b

Record = dict[str, Any]


class Skipped(Exception):
    """A step that cannot be measured on this machine; the text says why."""


@dataclass(frozen=True)
class Suite:
    """The device and the shapes."""

    device: torch.device
    tiny: bool
    blocks: int
    samples: int
    seqlen: int
    ratios: tuple[float, ...] = (0.2, 0.4, 0.6)
    repeats: int = 5

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def config(self, num_blocks: int | None = None, like: Callable[[], LlamaConfig] = llama_7b) -> LlamaConfig:
        config = like()
        if self.tiny:
            config.update({"vocab_size": 128, "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4})
            config.update({"num_key_value_heads": 4, "head_dim": 16, "num_hidden_layers": 2})
        elif num_blocks is not None:
            config.num_hidden_layers = num_blocks
        return config

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], Any], repeats: int | None = None) -> dict[str, float]:
        """Median and quartiles of the seconds of ``work``, after one call that is not counted."""
        work()
        times = []
        for _ in range(repeats or self.repeats):
            self.synchronise()
            started = time.perf_counter()
            work()
            self.synchronise()
            times.append(time.perf_counter() - started)
        return summary(times)


def random_model(config: LlamaConfig, suite: Suite) -> Any:
    torch.manual_seed(0)
    with torch.device(suite.device):
        return AutoModelForCausalLM.from_config(config, dtype=suite.dtype).eval()


def random_ids(suite: Suite, samples: int, seqlen: int) -> Tensor:
    vocab = suite.config().vocab_size
    return torch.randint(vocab, (samples, seqlen), generator=torch.Generator().manual_seed(0))


def llama_70b() -> LlamaConfig:
    """The shapes of Llama-3-70B (arXiv 2407.21783)."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )


def save_with_tokenizer(model: Any, folder: Path) -> Path:
    """Saves a model with a tokenizer of 100 words, and ``words.txt`` beside it, a text of them."""
    words = [f"w{number}" for number in range(100)]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=words[0]).save_pretrained(folder)
    chosen = torch.randint(len(words), (200_000,), generator=torch.Generator().manual_seed(0)).tolist()
    text = folder.with_name("words.txt")
    text.write_text(" ".join(words[number] for number in chosen), encoding="utf-8")
    return text
