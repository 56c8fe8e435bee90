"""What is measured, and how often."""

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
    """Every batch size with every length of a prompt.

    Args:
        batch_sizes: sequences at once.
        prompts: tokens of a prompt; None for those of ``PROMPTS`` that the models can take.
        gen: decode steps after it, of one token each.
        repeats: measured turns of every model.
        warmup: turns before them that are not.
        fuse: make one product of the first factors that read the same tensor (``svdllm.inference.fuse``).
        kv_cache: of the compressed models: ordinary, latent or latent-values (``svdllm.inference.latent_cache``).
        compile: compile all models with torch.compile.
        seed: of the random token ids.

    Raises:
        InputError: a number below 1, or the same one twice.
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
        """The same with the lengths of prompts chosen, where nobody gave them: with what follows they fit the context."""
        if self.prompts is not None:
            return self
        room = max(PROMPTS) if context is None else context - self.gen
        fitting = tuple(prompt for prompt in PROMPTS if prompt <= room)
        return replace(self, prompts=fitting or (max(1, room),))

    @property
    def cells(self) -> Iterator[tuple[int, int]]:
        """Batch size and prompt length of every measurement."""
        return product(self.batch_sizes, self.prompt_lengths)

    @property
    def longest(self) -> int:
        """The most tokens of a sequence."""
        return max(self.prompt_lengths) + self.gen

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
