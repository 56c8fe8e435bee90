"""What a run says about itself: plain records, from which tables, cards and JSON are made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from svdllm.compression.math.linalg import tail_energies
from svdllm.compression.plan import Plan
from svdllm.compression.recipe import Recipe
from svdllm.data import TokenWindows
from svdllm.models.structure import Target


@dataclass(frozen=True, kw_only=True)
class LinearRecord:
    """One linear after compression. Losses are in the metric of the method: for svd-llm, over the calibration tokens.

    ``loss`` is ``||(W - W') X||_F`` and ``relative_loss`` its share of ``||W X||_F``; ``kept_energy`` is
    ``1 - relative_loss^2``. A dense linear has rank None and loses nothing.
    """

    name: str
    parts: list[str]  # names of the linears, where several have one first factor; else none
    block: int
    out_features: int
    in_features: int
    rank: int | None
    params: int
    kept_energy: float
    loss: float
    relative_loss: float
    seconds: float


def linear_record(target: Target, rank: int | None, energies_K: Any, seconds: float) -> LinearRecord:
    """The record of a target truncated to ``rank`` whose spectrum is ``energies_K`` (float64, descending)."""
    tails = tail_energies(energies_K)
    total = float(tails[0])
    squared_loss = 0.0 if rank is None else float(tails[min(rank, len(tails) - 1)])
    share = squared_loss / total if total > 0 else 0.0
    return LinearRecord(
        name=target.name,
        parts=[name for name, _ in target.parts],
        block=target.block,
        out_features=target.out_features,
        in_features=target.in_features,
        rank=rank,
        params=target.params(rank),
        kept_energy=1 - share,
        loss=squared_loss**0.5,
        relative_loss=share**0.5,
        seconds=seconds,
    )


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a compressed model comes from."""

    model: str
    revision: str | None
    weights_fingerprint: str
    calibration: str | None
    calibration_tokens: int
    calibration_fingerprint: str | None

    @classmethod
    def of(cls, name: str, revision: str | None, fingerprint: str, windows: TokenWindows | None) -> Provenance:
        return cls(
            model=name,
            revision=revision,
            weights_fingerprint=fingerprint,
            calibration=None if windows is None else windows.source,
            calibration_tokens=0 if windows is None else windows.num_tokens,
            calibration_fingerprint=None if windows is None else windows.fingerprint,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class CompressionResult:
    """The record of a run: what was written where, and what it took (bytes, seconds)."""

    output_dir: Path
    recipe: Recipe
    plan: Plan
    linears: list[LinearRecord]
    seconds: dict[str, float]
    peak_ram_bytes: int
    peak_device_bytes: int
    warnings: list[str]

    def load(self, **kwargs: Any) -> Any:
        """The compressed model, by ``from_pretrained``."""
        from svdllm.checkpoint.load import load_model

        return load_model(self.output_dir, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        sizes = {
            key: getattr(self.plan, key)
            for key in (
                "model",
                "method",
                "achieved_ratio",
                "params",
                "dense_params",
                "file_bytes",
                "dense_file_bytes",
                "quantized_file_bytes",
                "ranks",
            )
        }
        unused = self.plan.unused_tensors
        return {
            "output_dir": str(self.output_dir),
            **sizes,
            "seconds": self.seconds,
            "peak_ram_bytes": self.peak_ram_bytes,
            "planned_ram_bytes": self.plan.peak_ram_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "speed": None if self.plan.speed is None else asdict(self.plan.speed),
            "unused_tensors": None if unused is None else asdict(unused),
            "warnings": self.warnings,
            "recipe": self.recipe.to_dict(),
        }
