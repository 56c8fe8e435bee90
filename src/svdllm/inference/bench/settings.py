"""Settings of a benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from svdllm.common.errors import InputError
from svdllm.inference.prepare import check_kv_cache

PROMPTS = (128, 512)  # tokens


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """Settings of a benchmark, which measures every batch size with every prompt length.

    Args:
        batch_sizes: numbers of sequences at once.
        prompts: prompt lengths in tokens; None for those of ``PROMPTS`` that fit the models' context.
        gen: number of decode steps, of one token each.
        repeats: measured turns of every model.
        warmup: turns before these that are not measured.
        fuse: join first factors that read the same tensor into one product (``svdllm.inference.fuse``).
        kv_cache: cache of the compressed models: ordinary, latent or latent-values (``svdllm.inference.latent_cache``).
        compile: compile all models with torch.compile.
        seed: seed of the random token ids.

    Raises:
        InputError: a number is below 1, or listed twice.
    """

    batch_sizes: tuple[int, ...] = (1, 8, 32)
    prompts: tuple[int, ...] | None = None
    gen: int = 64
    repeats: int = 5
    warmup: int = 1
    fuse: bool = True
    kv_cache: str = "ordinary"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_kv_cache(self.kv_cache)
        lists = {"--batch": self.batch_sizes, "--prompt": self.prompt_lengths}
        counts = {"--gen": (self.gen,), "--repeats": (self.repeats,), "--warmup": (self.warmup,)}
        for option, numbers in (lists | counts).items():
            if not numbers or min(numbers) < 1:
                raise InputError(f"{option} must be at least 1, found {', '.join(map(str, numbers)) or 'nothing'}.")
            if len(set(numbers)) < len(numbers):
                raise InputError(f"{option} {','.join(map(str, numbers))} names a number twice.")

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        return PROMPTS if self.prompts is None else self.prompts

    def within(self, context: int | None) -> BenchSettings:
        """Chooses the prompt lengths, if they are not given, so that prompt and decode steps fit the context."""
        if self.prompts is not None:
            return self
        room = max(PROMPTS) if context is None else context - self.gen
        fitting = tuple(prompt for prompt in PROMPTS if prompt <= room)
        return replace(self, prompts=fitting or (max(1, room),))

    @property
    def cells(self) -> Iterator[tuple[int, int]]:
        """Yields batch size and prompt length of every measurement."""
        return product(self.batch_sizes, self.prompt_lengths)

    @property
    def longest(self) -> int:
        """The largest number of tokens in a sequence."""
        return max(self.prompt_lengths) + self.gen

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
