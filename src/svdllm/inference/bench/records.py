"""Records of a benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from svdllm.inference.bench.roofline import Ideal

FASTER, SLOWER, UNCLEAR = "faster", "slower", "no clear difference"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The median and quartiles of repeated measurements, and all values in the order they were taken."""

    median: float
    lower_quartile: float
    upper_quartile: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
        return cls(median=middle, lower_quartile=low, upper_quartile=high, values=tuple(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.lower_quartile:.2f}, {self.upper_quartile:.2f}]"


@dataclass(frozen=True, kw_only=True)
class PhaseRecord:
    """Prefill or decode of one model at one batch size and prompt length.

    tokens: of all sequences; prompt tokens in a prefill, generated tokens in a decode.
    seconds: duration of the phase; for a prefill, the time to the first token.
    speed_up: seconds of the dense model / seconds, for each repeat; None without a dense model.
    ideal: the largest possible speed-up, see ``roofline``.
    """

    tokens: int
    seconds: Spread
    speed_up: Spread | None = None
    ideal: Ideal | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds.median

    @property
    def verdict(self) -> str | None:
        """Faster or slower than the dense model, if both quartiles of the speed-up are on the same side of 1."""
        if self.speed_up is None:
            return None
        if self.speed_up.lower_quartile > 1:
            return FASTER
        return SLOWER if self.speed_up.upper_quartile < 1 else UNCLEAR

    @property
    def reached(self) -> Ideal | None:
        """The speed-up as a share of each ideal."""
        if self.speed_up is None or self.ideal is None:
            return None
        return Ideal(
            linears=self.speed_up.median / self.ideal.linears,
            model=self.speed_up.median / self.ideal.model,
        )

    def to_dict(self) -> dict[str, Any]:
        reached = None if self.reached is None else asdict(self.reached)
        derived = {"tokens_per_second": self.tokens_per_second, "verdict": self.verdict, "reached": reached}
        return asdict(self) | derived


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes of memory at the peak of a prefill with its decode steps.

    weights: parameters, tied ones once.
    cache: keys and values after the last step, as measured; ``cache_by_formula`` is computed from shapes.
    activations: everything else.
    """

    weights: int
    cache: int
    cache_by_formula: int
    activations: int

    @property
    def peak(self) -> int:
        return self.weights + self.cache + self.activations

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"peak": self.peak}


@dataclass(frozen=True, kw_only=True)
class CellRecord:
    """One model at one batch size and prompt length; ``error`` says why it was not measured."""

    model: str
    batch: int
    prompt: int
    gen: int
    prefill: PhaseRecord | None = None
    decode: PhaseRecord | None = None
    memory: MemoryUse | None = None
    error: str | None = None

    @property
    def phases(self) -> dict[str, PhaseRecord]:
        both = {"prefill": self.prefill, "decode": self.decode}
        return {name: phase for name, phase in both.items() if phase is not None}

    @property
    def generated_per_second(self) -> float | None:
        """Generated tokens per second of prefill and decode together, as in the paper."""
        if self.prefill is None or self.decode is None:
            return None
        return self.decode.tokens / (self.prefill.seconds.median + self.decode.seconds.median)

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "batch": self.batch,
            "prompt": self.prompt,
            "gen": self.gen,
            "prefill": self.prefill and self.prefill.to_dict(),
            "decode": self.decode and self.decode.to_dict(),
            "time_to_first_token": self.prefill and self.prefill.seconds.median,
            "generated_per_second": self.generated_per_second,
            "memory": self.memory and self.memory.to_dict(),
            "error": self.error,
        }


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """A model that was measured.

    parameter_bytes: memory of its parameters, in the dtype of the benchmark; ``weight_bytes`` elsewhere are of files.
    linears: weights of the linears in its blocks.
    """

    name: str
    params: int
    parameter_bytes: int
    linears: int
    fused_groups: int
    latent_layers: int


@dataclass(frozen=True, kw_only=True)
class BenchmarkRecord:
    """All measurements of one run; ``base`` names the dense model among the models, if any."""

    base: str | None
    models: tuple[ModelRecord, ...]
    cells: tuple[CellRecord, ...]
    settings: dict[str, Any]
    machine: dict[str, Any]

    @property
    def compressed(self) -> list[str]:
        return [model.name for model in self.models if model.name != self.base]

    def of(self, model: str) -> list[CellRecord]:
        return [cell for cell in self.cells if cell.model == model]

    @property
    def findings(self) -> list[str]:
        """Says for every compressed model where it is faster than the dense model, and where it is not."""
        return [] if self.base is None else [_finding(self.of(name), name, self.base) for name in self.compressed]

    def to_dict(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "machine": self.machine,
            "settings": self.settings,
            "models": [asdict(model) for model in self.models],
            "cells": [cell.to_dict() for cell in self.cells],
            "findings": self.findings,
        }


def _finding(cells: Sequence[CellRecord], name: str, base: str) -> str:
    found: dict[str, list[str]] = {FASTER: [], SLOWER: [], UNCLEAR: []}
    for cell in cells:
        for phase, record in cell.phases.items():
            if record.verdict is not None:
                found[record.verdict].append(f"{phase} at {cell.batch} x {cell.prompt} ({record.speed_up})")
    if not any(found.values()):
        return f"{name} could be compared with {base} nowhere."
    parts = [f"{verdict} in {len(rows)}: {', '.join(rows)}" for verdict, rows in found.items() if rows]
    return f"{name} against {base}, at batch x prompt: {'; '.join(parts)}."
