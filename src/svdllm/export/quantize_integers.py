"""Rounds the linears of a model to the nearest integers, one at a time, and writes them as compressed-tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdllm.checkpoint.integers import integer_config
from svdllm.checkpoint.quantized import QuantizedLinear
from svdllm.checkpoint.tensors import Tensors, tensor_bytes
from svdllm.common.errors import InputError
from svdllm.compression.forms.bits import (
    BITS,
    DEFAULT_GROUP,
    GROUP_SIZES,
    group_size_for,
    packed_shapes,
    rounded_tensors,
)
from svdllm.compression.forms.layout import INTEGER_DTYPES
from svdllm.export.copies import write_model
from svdllm.export.quantize_job import QuantizeFormat, QuantizeJob
from svdllm.models.hub import hub_folder
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.weights import SafetensorsWeights, Weights


@dataclass(frozen=True)
class IntegerScheme:
    """Integers of which ``group_size`` inputs of a row share a scale; None stands for a whole row."""

    bits: int
    group_size: int | None

    def __str__(self) -> str:
        return f"{self.bits} bits, a scale per {f'{self.group_size} inputs' if self.group_size else 'row'}"

    def for_shape(self, out_features: int, in_features: int) -> IntegerScheme:
        """This scheme, with the nearest group size that divides the inputs."""
        size = group_size_for(in_features, self.group_size or in_features)
        return IntegerScheme(self.bits, size if size in GROUP_SIZES else None)


def integer_scheme(bits: int, group_size: int | None) -> IntegerScheme:
    """The scheme of some options of ``quantize``. Raises InputError if there is none."""
    if bits not in BITS:
        raise InputError(f"--bits {bits} is not possible: expected one of {', '.join(map(str, BITS))}.")
    if group_size is not None and group_size not in GROUP_SIZES:
        raise InputError(
            f"--group-size {group_size} is not possible: expected one of {', '.join(map(str, GROUP_SIZES))}. Leave it "
            f"out for {DEFAULT_GROUP}."
        )
    return IntegerScheme(bits, group_size or DEFAULT_GROUP)


class _Rounded:
    """The tensors of a model whose linears are rounded to nearest, each when it is asked for."""

    def __init__(
        self, weights: Weights, stored: Tensors, linears: Sequence[QuantizedLinear[IntegerScheme]], place: torch.device
    ):
        self._weights, self._place = weights, place
        self._linears = {linear.name: linear for linear in linears}
        self._last: tuple[str, Mapping[str, Tensor]] = ("", {})
        self.layout = rounded_layout(stored, linears)

    def get(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        linear = self._linears.get(owner)
        if linear is None or leaf == "bias":
            return self._weights.get(name)
        if self._last[0] != owner:
            weight_OI = self._weights.get(f"{owner}.weight").to(self._place)
            self._last = owner, rounded_tensors(weight_OI, linear.scheme.bits, linear.scheme.group_size)
        return self._last[1][leaf]


def rounded_layout(stored: Tensors, linears: Sequence[QuantizedLinear[IntegerScheme]]) -> Tensors:
    """The tensors of a model in few bits; integers and scales take the place of the weights of some linears."""
    schemes = {linear.name: linear.scheme for linear in linears}
    layout: Tensors = {}
    for name, (shape, dtype) in stored.items():
        owner, _, leaf = name.rpartition(".")
        if leaf != "weight" or owner not in schemes:
            layout[name] = (shape, dtype)
            continue
        scheme, (rows, columns) = schemes[owner], shape
        for part, own in packed_shapes(rows, columns, scheme.bits, scheme.group_size).items():
            layout[f"{owner}.{part}"] = (own, INTEGER_DTYPES.get(part, dtype))
    return layout


def _write(job: QuantizeJob) -> None:
    folder = job.source.folder
    if job.source.weights is None:
        folder = hub_folder(str(job.model), job.options.revision, job.options.offline, weights=True)
    assert folder is not None  # a GGUF file was refused
    weights = SafetensorsWeights(folder, job.skeleton)
    stored = {name: weights.shape_and_dtype(name) for name in weights.names()}
    tensors = _Rounded(weights, stored, job.linears, job.place)
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    groups: dict[tuple[int, int | None], list[str]] = {}
    for linear in job.linears:
        groups.setdefault((linear.scheme.bits, linear.scheme.group_size), []).append(linear.name)
    fields["quantization_config"] = integer_config(groups)
    write_model(job.folder, tensors, tensors.layout, fields, folder, LowRankInfo.of(job.source.config))


COMPRESSED_TENSORS = QuantizeFormat(
    name="compressed-tensors",
    summary="integers of 8 to 2 bits, as compress writes them; unpacked when they are loaded",
    package="compressed_tensors",
    scheme=integer_scheme,
    require=lambda source, bits: None,
    num_bytes=lambda tensors, linears: tensor_bytes(rounded_layout(tensors, linears)),
    in_memory=False,
    write=_write,
)
