"""The bits of a simulated model, and the file in its folder that tells them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from svdllm.checkpoint.tensors import Tensors, tensor_bytes
from svdllm.common.files import write_atomically
from svdllm.models.structure import Target

FILE = "simulated.json"


@dataclass(frozen=True, kw_only=True)
class DenseBytes:
    """The bytes of a dense model's tensors: those of the linears' weights, and those of all others."""

    linears: int
    others: int

    def removed_share(self, weight_bytes: float) -> float:
        """The share of the linears' bytes that a model of so many bytes lacks: the ratio of low rank as large."""
        return 1 - (weight_bytes - self.others) / self.linears


@dataclass(frozen=True, kw_only=True)
class SimulatedBits:
    """How large a model would be.

    num_weights: of the linears that are quantised.
    bits: of all of them, by the formula of the method.
    stored_bits: of all of them, with masks and scales.
    other_bytes: of all other tensors, as they are stored.
    dense: the bytes of the dense model.
    """

    num_weights: int
    bits: float
    stored_bits: float
    other_bytes: int
    dense: DenseBytes

    @property
    def weight_bytes(self) -> int:
        return self.other_bytes + round(self.bits / 8)

    @property
    def removed_share(self) -> float:
        """The share of the dense linears' bytes that the formula saves."""
        return self.dense.removed_share(self.weight_bytes)

    def to_dict(self) -> dict[str, Any]:
        return {
            "bits_per_weight": self.bits / self.num_weights,
            "stored_bits_per_weight": self.stored_bits / self.num_weights,
            "stored_weight_bytes": self.other_bytes + round(self.stored_bits / 8),
        }


def dense_bytes(targets: Sequence[Target], layout: Tensors) -> DenseBytes:
    """The bytes of a model with these linears and stored tensors."""
    names = [f"{linear}.weight" for target in targets for linear in target.linears]
    linears = tensor_bytes(layout, names)
    return DenseBytes(linears=linears, others=tensor_bytes(layout) - linears)


def bits_of(
    targets: Sequence[Target], layout: Tensors, bits: float, stored_bits: float, dense: DenseBytes
) -> SimulatedBits:
    """The bits of a model whose targets take ``bits`` together.

    Args:
        layout: the tensors in the files of the model that is quantised.
    """
    return SimulatedBits(
        num_weights=sum(target.num_weights for target in targets),
        bits=bits,
        stored_bits=stored_bits,
        other_bytes=dense_bytes(targets, layout).others,
        dense=dense,
    )


def write_simulated(folder: Path, settings: dict[str, Any], bits: SimulatedBits, seconds: dict[str, float]) -> None:
    """Writes the file that marks a folder as a finished simulated model of some settings."""
    content = {"settings": settings, "bits": asdict(bits), "seconds": seconds}
    write_atomically(folder / FILE, json.dumps(content, indent=1).encode())


def read_simulated(folder: Path) -> tuple[dict[str, Any], SimulatedBits, dict[str, float]] | None:
    """The settings, bits and seconds of a simulated model; None if the folder holds no finished one."""
    if not (folder / FILE).is_file():
        return None
    content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    bits = content["bits"] | {"dense": DenseBytes(**content["bits"]["dense"])}
    return content["settings"], SimulatedBits(**bits), content["seconds"]
