"""Variants in few bits that are simulated. Each has one size, whatever ratios are asked for."""

from __future__ import annotations

import json
import shutil
from abc import abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from svdllm.checkpoint.output import Output
from svdllm.common.run_options import RunOptions
from svdllm.comparison.compressed import Compressed
from svdllm.comparison.simulated.bits import read_simulated
from svdllm.comparison.simulated.one_bit import check_one_bit, one_bit
from svdllm.comparison.simulated.quantise import check_simulation, dense_linears, simulate
from svdllm.comparison.simulated.systems import SYSTEMS, System
from svdllm.comparison.variant import Variant
from svdllm.compression.math.few_bits.svid import one_bit_bits
from svdllm.compression.recipe import Recipe
from svdllm.data import check_source
from svdllm.recovery import Recovery
from svdllm.recovery.checks import check_data

ONE_BIT = "onebit"
SIMULATED_SYSTEMS = (*SYSTEMS, ONE_BIT)
# At which a model is compressed before its factors are quantised (SVD-LLM, Table 8).
BASE_RATIO = 0.4
# The settings of a recipe that a system reads.
OF_CALIBRATION = ("calibration", "samples", "seqlen", "seed", "ignore", "device", "dtype", "batch_tokens")


@dataclass(frozen=True, kw_only=True)
class Simulated(Variant):
    """A model in few bits whose weights are stored dequantised; its bytes are counted."""

    recipe: Recipe  # of the calibration

    def ratios(self, asked: tuple[float, ...]) -> tuple[None]:
        return (None,)

    def is_made(self, folder: Path, settings: dict[str, Any]) -> bool | None:
        found = read_simulated(folder)
        if found is None:
            return None if folder.exists() else False
        return found[0] == json.loads(json.dumps(self.own_settings())) or None

    def settings(self, ratio: float | None) -> dict[str, Any]:
        return super().settings(ratio) | {"simulated": self.own_settings()}

    def record(self, folder: str | Path) -> dict[str, Any]:
        found = read_simulated(Path(folder))
        assert found is not None
        _, bits, seconds = found
        return super().record(folder) | {
            "compression_seconds": seconds,
            "simulated": bits.to_dict(),
            "weight_bytes": bits.weight_bytes,
            "achieved_ratio": bits.removed_share,
        }

    def describe(self) -> str:
        return f"simulated: {json.dumps(self.own_settings())}\n"

    @abstractmethod
    def own_settings(self) -> dict[str, Any]:
        """Everything that decides the model, as JSON."""

    @abstractmethod
    def expected_share(self, model: str, options: RunOptions) -> float:
        """The share of the linears' bytes that it saves, as far as its formula tells beforehand."""


@dataclass(frozen=True, kw_only=True)
class Quantised(Simulated):
    """A model whose linears, or whose factors, a system quantises.

    ``compressed`` makes the factors; without it the dense model is quantised.
    """

    system: System
    compressed: Compressed | None = None

    @property
    def key(self) -> str:
        """That of the compressed models that share its analysis."""
        return self.name if self.compressed is None else self.compressed.key

    @property
    def calibration(self) -> str | None:
        return Compressed(name=self.name, recipe=self.recipe).calibration

    def within(self, context: int | None) -> Quantised:
        within = None if self.compressed is None else self.compressed.within(context)
        return replace(self, recipe=self.recipe.within(context), compressed=within)

    def check(self, model: str, ratios: tuple[float, ...], options: RunOptions) -> None:
        if self.compressed is None:
            check_simulation(model, self.system, self.recipe, options)
            check_source(self.recipe.calibration)
        else:
            self.compressed.check(model, (BASE_RATIO,), options)

    def own_settings(self) -> dict[str, Any]:
        base = None if self.compressed is None else self.compressed.at(BASE_RATIO).to_dict()
        calibration = {name: value for name, value in self.recipe.to_dict().items() if name in OF_CALIBRATION}
        return {"system": self.system.name, "calibration": calibration, "factors of": base}

    def expected_share(self, model: str, options: RunOptions) -> float:
        dense = dense_linears(model, self.recipe, options)
        kept = 1.0 if self.compressed is None else 1 - BASE_RATIO
        bits = kept * sum(self.system.bits(target.out_features, target.in_features) for target in dense.targets)
        return dense.bytes.removed_share(dense.bytes.others + bits / 8)

    def make(self, model: str, ratio: float | None, folder: Path, analysis: Path, options: RunOptions) -> Path:
        dense = dense_linears(model, self.recipe, options)
        place = model if self.compressed is None else str(self._factors(model, folder, analysis, options))
        quantised_options = options if self.compressed is None else replace(options, revision=None)
        _remove_unfinished(folder)
        settings = self.own_settings()
        simulate(place, self.system, self.recipe, folder, quantised_options, settings=settings, dense=dense.bytes)
        if self.compressed is not None:
            shutil.rmtree(place)
        return folder

    def _factors(self, model: str, folder: Path, analysis: Path, options: RunOptions) -> Path:
        """The compressed model beside the folder; an earlier run may have left it."""
        assert self.compressed is not None
        place = folder.with_name(f"{folder.name}-factors")
        settings = {"recipe": self.compressed.at(BASE_RATIO).to_dict(), "recovery": None}
        if not self.compressed.is_made(place, settings):
            shutil.rmtree(place, ignore_errors=True)
            self.compressed.make(model, BASE_RATIO, place, analysis, options)
        return place


@dataclass(frozen=True, kw_only=True)
class OneBit(Simulated):
    """OneBit: signs and value vectors, trained for as many steps as the settings of the training say."""

    recovery: Recovery

    def check(self, model: str, ratios: tuple[float, ...], options: RunOptions) -> None:
        check_data(self.recovery, ())
        check_one_bit(model, self.recovery, options)

    def own_settings(self) -> dict[str, Any]:
        return {"system": ONE_BIT, "training": self.recovery.model_dump(mode="json")}

    def expected_share(self, model: str, options: RunOptions) -> float:
        dense = dense_linears(model, self.recipe, options)
        bits = sum(one_bit_bits(target.out_features, target.in_features) for target in dense.targets)
        return dense.bytes.removed_share(dense.bytes.others + bits / 8)

    def make(self, model: str, ratio: float | None, folder: Path, analysis: Path, options: RunOptions) -> Path:
        _remove_unfinished(folder)
        one_bit(model, self.recovery, folder, options, settings=self.own_settings())
        return folder


def ratios_of_equal_bytes(
    variants: tuple[Variant, ...], model: str, options: RunOptions, near: float
) -> tuple[float, ...]:
    """The ratios at which low rank is as large as the simulated models; of sizes that are near, the largest model's.

    Args:
        near: difference of ratios up to which two sizes count as one.
    """
    shares = sorted(v.expected_share(model, options) for v in variants if isinstance(v, Simulated))
    kept: list[float] = []
    for share in (round(share, 4) for share in shares):
        if not kept or share - kept[-1] > near:
            kept.append(share)
    return tuple(kept)


def _remove_unfinished(folder: Path) -> None:
    """Removes what a run that was killed has left."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(Output.at(folder).writing, ignore_errors=True)
