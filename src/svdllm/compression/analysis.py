"""Stores an analysis: one file per finished block with the spectrum and basis of every target.

Any rank is a slice of a basis, and a finished file is final. A resumed run and further ratios start from these files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from svdllm.checkpoint.elastic import Probes
from svdllm.common.files import save_atomically, write_atomically
from svdllm.common.settings_file import FINGERPRINT_FILE, read_settings, refuse_other_settings
from svdllm.compression.decompose import Decomposed
from svdllm.compression.math.linalg import Spectrum
from svdllm.compression.math.narrowing import Narrowing
from svdllm.compression.math.pullback import Pullback
from svdllm.models.structure import Target


class Analysis:
    """The folder of an analysis.

    ``settings`` decide its content. A folder that was made with other settings is refused by ``open``.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))

    def open(self) -> None:
        """Creates the folder, or continues an earlier run's.

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

    def write(
        self,
        block: int,
        decomposed: Decomposed,
        seconds: Mapping[str, float],
        means: Mapping[str, Tensor] | None = None,
        *,
        keep_metrics: bool = False,
        part: int | None = None,
    ) -> None:
        """Writes the file of a finished block; it appears under its name when it is complete.

        A block that is done in parts has a file of each. That of the last part makes the block done.

        Args:
            decomposed: what ``decompose`` returned.
            seconds: as ``seconds`` returns them.
            means: mean inputs by group, where biases are corrected.
            keep_metrics: keeps the right metrics of the block, for a sequential calibration.
            part: number of the part; None for the last, or the whole block.
        """
        tensors = {f"{group}.mean": mean for group, mean in (means or {}).items()} | _by_name(decomposed)
        write_atomically(self._file(block).with_suffix(".json"), json.dumps(dict(seconds)).encode())
        save_atomically(tensors, _of_part(self._file(block), part))
        if not keep_metrics and part is None:
            for file in _files(self._metrics_file(block)):
                file.unlink(missing_ok=True)

    def write_share(self, block: int, decomposed: Decomposed, process: int, part: int | None) -> None:
        """Writes what another process than the first has decomposed of a block, or of a part of it."""
        file = self._file(block)
        name = f"{file.stem}.part-{'last' if part is None else f'{part:04d}'}-{process}{file.suffix}"
        save_atomically(_by_name(decomposed), file.with_name(name))

    def spectrum(self, target: Target) -> Spectrum:
        with safe_open(_holding(self._file(target.block), f"{target.name}.energies"), framework="pt") as file:
            stored = set(file.keys())
            parts = ((field, f"{target.name}.{field.split('_')[0]}") for field in Spectrum._fields)
            return Spectrum(**{field: file.get_tensor(name).clone() for field, name in parts if name in stored})

    def rounding(self, target: Target) -> dict[int, float] | None:
        """Bits -> squared error of a target that is rounded; None where it cannot be."""
        found = _tensor_if_there(self._file(target.block), f"{target.name}.rounding")
        return None if found is None else {int(bits): float(error) for bits, error in found.mT}

    def corrections(self, target: Target) -> Tensor | None:
        """The squared error at every rank of a correction (corrected bits x ranks); None where it has none."""
        return _tensor_if_there(self._file(target.block), f"{target.name}.corrections")

    def narrowing(self, block: int, mlp: str) -> Narrowing:
        """How an MLP of a block is narrowed."""
        with safe_open(_holding(self._file(block), f"{mlp}.order"), framework="pt") as file:
            return Narrowing(*(file.get_tensor(f"{mlp}.{part}").clone() for part in Narrowing._fields))

    def narrowing_tails(self, block: int, mlp: str) -> Tensor:
        """The squared error of an MLP at every width (``width + 1``, float64)."""
        return _tensor(self._file(block), f"{mlp}.tails")

    def inner_order(self, target: Target) -> Tensor | None:
        """The inner features of a target's MLP, those first that are kept longest; None outside an MLP."""
        if target.inner is None:
            return None
        return _tensor(self._file(target.block), f"{target.inner.mlp}.order")

    def is_ready(self, block: int) -> bool:
        """Whether the forward walk has finished a block."""
        return self.is_done(block) or self._metrics_file(block).is_file()

    def mean(self, target: Target, *, waiting: bool = False) -> Tensor:
        """The mean input of a target (``in_features``, float64).

        With ``waiting`` it is read from a block that waits for the reverse walk.
        """
        file_of = self._metrics_file if waiting else self._file
        return _tensor(file_of(target.block), f"{target.group}.mean")

    def write_metrics(
        self,
        block: int,
        metrics: Mapping[str, Tensor],
        means: Mapping[str, Tensor],
        seconds: float,
        part: int | None = None,
    ) -> None:
        """Keeps the right metrics of a block, by group, until the reverse walk has finished the block."""
        write_atomically(self._file(block).with_suffix(".json"), json.dumps({"": seconds}).encode())
        named_means = {f"{group}.mean": mean for group, mean in means.items()}
        save_atomically({**metrics, **named_means}, _of_part(self._metrics_file(block), part))

    def metric(self, target: Target) -> Tensor | None:
        """The right metric of a target whose block waits for the reverse walk, or whose metrics are kept; else None."""
        return _tensor_if_there(self._metrics_file(target.block), target.group)

    def write_left_metrics(self, block: int, metrics: Mapping[str, Tensor | Pullback], part: int | None = None) -> None:
        """Keeps the left metrics of a block's targets, in float32, for a sequential calibration."""
        kept: dict[str, Tensor] = {}
        for name, metric in metrics.items():
            parts = {"": metric} if isinstance(metric, Tensor) else metric._asdict()
            kept |= {f"{name} {part}".rstrip(): tensor.float() for part, tensor in parts.items()}
        save_atomically(kept, _of_part(self._left_file(block), part))

    def left_metric(self, target: Target) -> Tensor | Pullback | None:
        """The left metric of a target; None for the identity."""
        file = self._left_file(target.block)
        if (metric := _tensor_if_there(file, target.name)) is not None:
            return metric
        parts = [_tensor_if_there(file, f"{target.name} {part}") for part in Pullback._fields]
        known = [part for part in parts if part is not None]
        return Pullback(*known) if known else None

    def energies(self, target: Target) -> Tensor:
        """The spectrum of a target alone: descending, float64."""
        return _tensor(self._file(target.block), f"{target.name}.energies")

    def write_probes(self, allocation: str, probes: Probes) -> None:
        content = {name: list(measured.items()) for name, measured in probes.items()}
        write_atomically(self._probes_file(allocation), json.dumps(content).encode())

    def read_probes(self, allocation: str) -> Probes:
        """The probes that were written for an allocation; empty if there are none."""
        file = self._probes_file(allocation)
        if not file.is_file():
            return {}
        return {name: dict(measured) for name, measured in json.loads(file.read_text(encoding="utf-8")).items()}

    def write_expert_tokens(self, block: int, tokens: Mapping[str, int]) -> None:
        """Keeps the number of tokens that were routed to each expert of a block."""
        write_atomically(self._tokens_file(block), json.dumps(dict(tokens)).encode())

    def expert_tokens(self) -> dict[str, int]:
        """Expert -> number of tokens routed to it; empty for a model without experts, or where it was not counted."""
        tokens: dict[str, int] = {}
        for file in sorted(self.folder.glob("tokens-*.json")):
            tokens |= json.loads(file.read_text(encoding="utf-8"))
        return tokens

    def seconds(self, block: int) -> dict[str, float]:
        """Seconds of the decomposition by target, and under ``""`` of the block's walks and statistics."""
        return json.loads(self._file(block).with_suffix(".json").read_text(encoding="utf-8"))

    def _file(self, block: int) -> Path:
        return self.folder / f"block-{block:04d}.safetensors"

    def _probes_file(self, allocation: str) -> Path:
        return self.folder / f"probes-{allocation}.json"

    def _left_file(self, block: int) -> Path:
        return self.folder / f"left-{block:04d}.safetensors"

    def _tokens_file(self, block: int) -> Path:
        return self.folder / f"tokens-{block:04d}.json"

    def _metrics_file(self, block: int) -> Path:
        return self.folder / f"metrics-{block:04d}.safetensors"


def _by_name(decomposed: Decomposed) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, rounding in decomposed.roundings.items():
        parts = {f"{name}.rounding": rounding.errors, f"{name}.corrections": rounding.corrections}
        tensors |= {part: tensor for part, tensor in parts.items() if tensor is not None}
    for name, narrowing in decomposed.narrowings.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in narrowing._asdict().items()}
    for name, spectrum in decomposed.spectra.items():
        parts = ((f"{name}.{field.split('_')[0]}", tensor) for field, tensor in spectrum._asdict().items())
        tensors |= {part: tensor for part, tensor in parts if tensor is not None}
    return tensors


def _of_part(file: Path, part: int | None) -> Path:
    """The file of a part of a block: that of the last part has the name of the block."""
    return file if part is None else file.with_name(f"{file.stem}.part-{part:04d}{file.suffix}")


def _files(file: Path) -> list[Path]:
    """The files of all parts of a block that are there, the last part first."""
    return [file] * file.is_file() + sorted(file.parent.glob(f"{file.stem}.part-*{file.suffix}"))


@lru_cache(maxsize=2**10)
def _names_in(file: Path, _written: int) -> frozenset[str]:
    with safe_open(file, framework="pt") as opened:
        return frozenset(opened.keys())


def _holding(file: Path, name: str) -> Path:
    """The file, of those of all parts of a block, that holds a tensor; that of the block if none does."""
    files = _files(file)
    if len(files) == 1:
        return files[0]
    return next((part for part in files if name in _names_in(part, part.stat().st_mtime_ns)), file)


def _tensor(file: Path, name: str) -> Tensor:
    with safe_open(_holding(file, name), framework="pt") as opened:
        return opened.get_tensor(name).clone()


def _tensor_if_there(file: Path, name: str) -> Tensor | None:
    if not _files(file):
        return None
    with safe_open(_holding(file, name), framework="pt") as opened:
        return opened.get_tensor(name).clone() if name in opened.keys() else None  # noqa: SIM118


class FinalFactors:
    """The folder of a sequential calibration for one allocation: fitted factors and weights, one file per block."""

    def __init__(self, folder: Path):
        self.folder = folder

    def is_done(self, block: int) -> bool:
        return self._file(block).is_file()

    def write(self, block: int, factors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Writes the file of a finished block: target -> name in its low-rank linear -> tensor."""
        tensors = {f"{name} {leaf}": tensor for name, leaves in factors.items() for leaf, tensor in leaves.items()}
        save_atomically(tensors, self._file(block))

    def of(self, target: Target) -> dict[str, Tensor]:
        """The tensors of one target; empty if the target keeps its dense weight."""
        path = self._file(target.block)
        names = [name for name in _names_in(path, path.stat().st_mtime_ns) if name.startswith(f"{target.name} ")]
        with safe_open(path, framework="pt") as file:
            return {name.split(" ")[1]: file.get_tensor(name).clone() for name in sorted(names)}

    def _file(self, block: int) -> Path:
        return self.folder / f"block-{block:04d}.safetensors"
