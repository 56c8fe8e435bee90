"""Records of a run, from which tables, model cards and reports are made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from svdllm.common.version import __version__
from svdllm.compression.few_tokens import ExpertTokens
from svdllm.compression.forms import rank_of
from svdllm.compression.forms.layout import params
from svdllm.compression.plan import Plan
from svdllm.compression.recipe import Recipe
from svdllm.data import TokenWindows
from svdllm.models.chosen import Chosen
from svdllm.models.low_rank import FORMAT_VERSION
from svdllm.models.structure import Target


@dataclass(frozen=True, kw_only=True)
class LinearRecord:
    """One linear after compression.

    ``size`` is the rank, or the width of a narrower MLP; its loss is that of the linear that reads the inner features.
    ``loss`` is ``||(W - W') X||_F`` and ``relative_loss`` its share of ``||W X||_F``, in the metric of the method (for
    svd-llm, over the calibration tokens). ``kept_energy`` is ``1 - relative_loss^2``. A linear that stays dense has
    size None and no loss; ``rank`` is None where the form has none.
    """

    name: str
    parts: list[str]  # names of the linears that share this first factor; empty for a linear of its own
    block: int
    out_features: int
    in_features: int
    form: str
    size: int | None
    rank: int | None
    params: int
    kept_energy: float
    loss: float
    relative_loss: float
    seconds: float


def linear_record(target: Target, chosen: Chosen | None, tails: Tensor, seconds: float) -> LinearRecord:
    """The record of a target in a form.

    Args:
        tails: squared error at every size, from 0 on.
        seconds: of its decomposition.
    """
    total = float(tails[0])
    squared_loss = 0.0 if chosen is None else float(tails[min(chosen.size, len(tails) - 1)])
    share = squared_loss / total if total > 0 else 0.0
    return LinearRecord(
        name=target.name,
        parts=[name for name, _ in target.parts],
        block=target.block,
        out_features=target.out_features,
        in_features=target.in_features,
        form="dense" if chosen is None else chosen.form,
        size=None if chosen is None else chosen.size,
        rank=rank_of(chosen),
        params=params(target, chosen),
        kept_energy=1 - share,
        loss=squared_loss**0.5,
        relative_loss=share**0.5,
        seconds=seconds,
    )


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The origin of a compressed model: dense model and calibration text, with hashes of both."""

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
    """The result of a run: the checkpoint's folder, its plan, and the memory (bytes) and time (seconds) it took.

    The memory is that of the process that took most.
    """

    output_dir: Path
    recipe: Recipe
    plan: Plan
    linears: list[LinearRecord]
    seconds: dict[str, float]
    peak_ram_bytes: int
    peak_device_bytes: int
    warnings: list[str]

    def load(self, **kwargs: Any) -> Any:
        """Loads the compressed model by ``from_pretrained``."""
        from svdllm.checkpoint.load import load_model

        return load_model(self.output_dir, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        unused = self.plan.unused_tensors
        return {
            "output_dir": str(self.output_dir),
            "model": self.plan.model,
            "method": self.recipe.method,
            "ratio": self.recipe.ratio,
            **asdict(self.plan.sizes),
            "ranks": {name: rank for name, chosen in self.plan.forms.items() if (rank := rank_of(chosen)) is not None},
            "forms": {name: asdict(chosen) for name, chosen in self.plan.forms.items()},
            "seconds": self.seconds,
            "peak_ram_bytes": self.peak_ram_bytes,
            "planned_ram_bytes": self.plan.peak_ram_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "speed": None if self.plan.speed is None else asdict(self.plan.speed),
            "unused_tensors": None if unused is None else asdict(unused),
            "warnings": self.warnings,
            "recipe": self.recipe.to_dict(),
        }


def report_of(
    plan: Plan,
    recipe: Recipe,
    provenance: Provenance,
    linears: list[LinearRecord],
    experts: ExpertTokens | None = None,
) -> dict[str, Any]:
    """The content of ``svdllm/report.json``, without the times of the run."""
    return {
        "format_version": FORMAT_VERSION,
        "source": provenance.to_dict(),
        "method": recipe.method,
        "recipe": recipe.to_dict(),
        "allocation": {
            "name": plan.allocation_name,
            "predicted_loss": plan.allocation.predicted_loss,
            "gap": plan.allocation.gap,
            "threshold": plan.allocation.threshold,
        },
        "speed": None if plan.speed is None else asdict(plan.speed),
        "linear_times": None if plan.linear_times is None else asdict(plan.linear_times),
        "ratio": recipe.ratio,
        **asdict(plan.sizes),
        "versions": {"svdllm": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "warnings": plan.warnings,
        "quantized_source": None if plan.quantized_source is None else asdict(plan.quantized_source),
        "unused_tensors": None if plan.unused_tensors is None else asdict(plan.unused_tensors),
        "dense_parts": [asdict(part) for part in plan.structure.dense_parts],
        "outside_parts": [asdict(part) for part in plan.structure.outside],
        "experts": None if experts is None else asdict(experts),
        "vocabulary": {t.name: asdict(plan.forms[t.name]) for t in plan.structure.vocabulary if t.name in plan.forms},
        "linears": [asdict(record) for record in linears],
    }
