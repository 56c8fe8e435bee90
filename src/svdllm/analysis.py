"""The analysis: one file per finished block with the spectrum and basis of every target.

It is what resume and several ratios live on: any rank is a slice of a basis, and a finished file is final.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from svdllm.errors import InputError, NumericalError
from svdllm.linalg import output_spectrum
from svdllm.methods import Method
from svdllm.statistics import Statistic
from svdllm.stream import Block
from svdllm.structure import Target, input_groups
from svdllm.weights import save_tensors

FINGERPRINT_FILE = "analysis.json"


@dataclass(frozen=True)
class TargetSpectrum:
    """The stored spectrum of a target: ``energies_K`` (float64) and ``basis_OD``."""

    energies_K: Tensor
    basis_OD: Tensor


class Analysis:
    """The folder of a run's analysis.

    ``settings`` are all that decides its content; opening a folder that was made with others is refused.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))

    def open(self) -> None:
        """Creates the folder, or takes up an earlier run's.

        Raises:
            InputError: the earlier run had other settings; names them.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if found := read_settings(self.folder):
            refuse_other_settings(found, self.settings, self.folder.parent)
        else:
            write_atomically(self.folder / FINGERPRINT_FILE, json.dumps(self.settings, indent=2).encode())

    def is_done(self, block: int) -> bool:
        return self._file(block).is_file()

    def write(self, block: int, spectra: Mapping[str, TargetSpectrum], seconds: Mapping[str, float]) -> None:
        """Makes a block final: the file appears under its name only when it is complete."""
        tensors = {}
        for name, spectrum in spectra.items():
            tensors[f"{name}.energies"] = spectrum.energies_K.cpu().contiguous()
            tensors[f"{name}.basis"] = spectrum.basis_OD.cpu().contiguous()
        write_atomically(self._file(block).with_suffix(".json"), json.dumps(dict(seconds)).encode())
        partial = self._file(block).with_suffix(".partial")
        save_tensors(tensors, partial)
        partial.replace(self._file(block))

    def spectrum(self, target: Target) -> TargetSpectrum:
        with safe_open(self._file(target.block), framework="pt") as file:
            energies_K = file.get_tensor(f"{target.name}.energies").clone()
            return TargetSpectrum(energies_K, file.get_tensor(f"{target.name}.basis").clone())

    def energies(self, target: Target) -> Tensor:
        with safe_open(self._file(target.block), framework="pt") as file:
            return file.get_tensor(f"{target.name}.energies").clone()

    def seconds(self, block: int) -> dict[str, float]:
        """Seconds of each target's decomposition, and of the block's forward pass and statistics (``""``)."""
        return json.loads(self._file(block).with_suffix(".json").read_text(encoding="utf-8"))

    def _file(self, block: int) -> Path:
        return self.folder / f"block-{block:04d}.safetensors"


def collect_statistics(block: Block, targets: list[Target], method: Method) -> dict[str, Statistic]:
    """Runs a block over all its batches and accumulates one statistic per distinct input.

    Returns a dict target -> statistic; targets that read the same tensor share the object.
    """
    linears = [(target.name, block.walk.skeleton.get_submodule(target.name)) for target in targets]
    in_features = {target.name: target.in_features for target in targets}
    statistics: dict[str, Statistic] = {}
    assert method.statistic is not None

    def on_input(leader: str, inputs: Tensor) -> None:
        if leader not in statistics:
            statistics[leader] = method.statistic(in_features[leader], inputs.device)  # type: ignore[misc]
        statistics[leader].add(inputs)

    with input_groups(linears, on_input) as (groups, release):
        block.run(after_batch=release)
    uncalled = [name for name, _ in linears if name not in groups]
    if uncalled:
        raise InputError(f"{', '.join(uncalled)} saw no token; leave them dense with --ignore.")
    return {target.name: statistics[groups[target.name]] for target in targets}


def decompose(
    block: Block,
    targets: list[Target],
    statistics: Mapping[str, Statistic],
    method: Method,
    alpha: float,
    depths: Mapping[str, int],
) -> tuple[dict[str, TargetSpectrum], dict[str, float]]:
    """Spectra and bases of a block's targets in the method's metric, and the seconds each took."""
    spectra, seconds = {}, {}
    metrics: dict[int, Tensor | None] = {}  # by statistic, which targets with the same input share
    for target in targets:
        started = time.perf_counter()
        statistic = statistics.get(target.name)
        if id(statistic) not in metrics:
            metric = method.right(None if statistic is None else statistic.value(), alpha)
            if metric is not None and not bool(torch.isfinite(metric).all()):
                raise NumericalError(
                    f"The inputs of {target.name} have NaN or infinite values over the calibration text."
                )
            metrics = {id(statistic): metric}  # the one before is not needed again
        weight_OI = weight_of(block.walk.skeleton.get_submodule(target.name), target)
        try:
            spectrum = output_spectrum(weight_OI, metrics[id(statistic)], depths[target.name])
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise NumericalError(f"The spectrum of {target.name} did not converge: {error}") from error
        basis_dtype = torch.float64 if block.walk.dtype == torch.float64 else torch.float32
        spectra[target.name] = TargetSpectrum(spectrum.energies_K, spectrum.basis_OD.to(basis_dtype))
        seconds[target.name] = time.perf_counter() - started
    return spectra, seconds


def weight_of(module: torch.nn.Module, target: Target) -> Tensor:
    """The weight as ``out x in``, whatever the module keeps."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.detach().mT if target.is_conv1d else weight.detach()


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of an analysis folder; empty where a run was killed before it wrote them."""
    file = folder / FINGERPRINT_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def refuse_other_settings(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Raises InputError that names each setting in which two runs differ."""
    keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    if keys:
        differences = "; ".join(f"{key} was {_short(found.get(key))}, is now {_short(wanted.get(key))}" for key in keys)
        raise InputError(
            f"An unfinished run in {folder} had other settings: {differences}. Repeat it with the old settings to go on, "
            "or start over with --no-resume."
        )


def write_atomically(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
