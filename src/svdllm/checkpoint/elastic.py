"""Reads and writes the elastic files of a checkpoint, from which every smaller size can be sliced.

The factors of a smaller rank are the first columns and rows of the factors of a larger rank, to the last bit. The
factors in the checkpoint thus contain their smaller sizes. A linear that is dense in the checkpoint may be factorised
at a higher ratio: ``svdllm/elastic*.safetensors`` has its factors, and the energies of every target (float64), which
choose the ranks and give the losses. ``svdllm/elastic.json`` has the tensors of the dense source, the probes, and the
hashes of the weight files that it belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from svdllm.checkpoint.tensors import Tensors
from svdllm.common.errors import CheckpointError, InputError, first_line

ELASTIC_FILE = "svdllm/elastic.json"
ELASTIC_STEM = "svdllm/elastic"  # of the safetensors files
ELASTIC_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class ElasticIndex:
    """The content of ``svdllm/elastic.json``.

    stored: tensors of the dense source, in the order of its files.
    weights: weight file of the checkpoint -> SHA-256.
    """

    stored: Tensors
    probes: Probes
    weights: dict[str, str]

    def write(self, folder: Path) -> None:
        content = {
            "format_version": ELASTIC_VERSION,
            "tensors": [
                [name, list(shape), str(dtype).removeprefix("torch.")] for name, (shape, dtype) in self.stored.items()
            ],
            "probes": {name: list(measured.items()) for name, measured in self.probes.items()},
            "weights": self.weights,
        }
        (folder / ELASTIC_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> ElasticIndex:
        """Reads the index of a checkpoint.

        Raises:
            InputError: the checkpoint is not elastic.
            CheckpointError: the file is damaged, or of another version.
        """
        file = folder / ELASTIC_FILE
        if not file.is_file():
            raise InputError(
                f"{folder} is not elastic: it has no {ELASTIC_FILE}. Make an elastic one with `svdllm compress MODEL "
                "-o OUT --ratio ... --elastic`; a folder written by save_pretrained is not elastic any more."
            )
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            version = content["format_version"]
            if version != ELASTIC_VERSION:
                raise CheckpointError(
                    f"{file} has format_version {version!r}, this version of svdllm reads {ELASTIC_VERSION}. Slice "
                    "with the version that wrote it."
                )
            return cls(
                stored={name: (tuple(shape), getattr(torch, dtype)) for name, shape, dtype in content["tensors"]},
                probes={name: dict(measured) for name, measured in content["probes"].items()},
                weights=dict(content["weights"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{file} is damaged: {first_line(error)}") from error


class TensorFiles:
    """The tensors of several safetensors files by their names there. A part of a tensor is read alone."""

    def __init__(self, files: Iterable[Path]):
        self._place: dict[str, Path] = {}
        for path in files:
            try:
                with safe_open(path, framework="pt") as file:
                    self._place |= dict.fromkeys(file.keys(), path)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is truncated or damaged: {first_line(error)}") from error

    def get(self, name: str, rows: int | None = None, columns: int | None = None) -> Tensor:
        """Reads a tensor, or the first rows or columns of a matrix.

        Raises:
            CheckpointError: no file has the tensor.
        """
        if name not in self._place:
            files = sorted({path.name for path in self._place.values()})
            raise CheckpointError(f"{name} is missing: it is in none of {', '.join(files)}.")
        with safe_open(self._place[name], framework="pt") as file:
            if rows is None and columns is None:
                return file.get_tensor(name).clone()  # a copy, so that the file is mapped only during this call
            return file.get_slice(name)[:rows, :columns].clone(memory_format=torch.contiguous_format)


class SlicedTensors:
    """The tensors of a smaller size, cut from the tensors of an elastic checkpoint."""

    def __init__(self, weights: TensorFiles, elastic: TensorFiles, stored: Mapping[str, int], ranks: Mapping[str, int]):
        self._weights, self._elastic, self._stored, self._ranks = weights, elastic, stored, ranks

    def get(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        owner, _, factor = owner.rpartition(".")
        if owner not in self._ranks or factor not in ("svd_u", "svd_v"):
            return self._weights.get(name)
        if leaf != "weight":
            return self._weights.get(name if owner in self._stored else f"{owner}.{leaf}")
        rank = self._ranks[owner]
        files = self._weights if owner in self._stored else self._elastic
        return files.get(name, rows=rank) if factor == "svd_v" else files.get(name, columns=rank)


# Target -> rank -> measured loss (nats per token) if this target alone is truncated to this rank.
Probes = Mapping[str, Mapping[int, float]]
