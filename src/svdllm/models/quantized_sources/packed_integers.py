"""Small integers packed into larger ones: GPTQ, AWQ and BitNet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svdllm.models.quantized_sources.layout import Layout, Parts, Values, exactly, require_shape

_WORD = 32  # bits
# AWQ stores the columns 0, 2, 4, 6, 1, 3, 5, 7 of eight from the lowest four bits on.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # column -> its place in the word


@dataclass(frozen=True)
class Gptq:
    """``quant_method: gptq`` (arXiv 2210.17323): packed along the inputs; zero points packed along the outputs.

    ``offset`` is added to stored zero points: 1 in the first version of the format, 0 in the second.
    """

    bits: int
    group_size: int
    offset: int

    layouts = (
        Layout(
            ".qweight",
            ".weight",
            {torch.int32},
            {"scales": (".scales",), "zero points": (".qzeros",), "group index": (".g_idx",)},
            optional={"group index"},
        ),
    )
    of_activations = ()

    @property
    def title(self) -> str:
        return f"GPTQ ({self.bits} bits)"

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Gptq:
        """Reads bits, group size and version. Raises ValueError for those that are not known."""
        offsets = {"gptq": 1, "gptq_v2": 0}
        version = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        bits, group_size = _bits_and_group_size(settings, (2, 3, 4, 8))
        if version not in offsets:
            raise ValueError(f"checkpoint_format is {version!r}, expected {' or '.join(offsets)}")
        return cls(bits, group_size, offsets[version])

    def shape(self, name: str, parts: Parts) -> tuple[int, ...]:
        words, outputs = parts["main"].shape
        inputs = exactly(words * _WORD, self.bits, "32 x the number of packed rows")
        groups = _num_groups(inputs, self.group_size)
        require_shape(parts["scales"], [(groups, outputs)], f"scales (groups of {self.group_size} inputs)")
        zeros = exactly(outputs * self.bits, _WORD, "bits x outputs")
        require_shape(parts["zero points"], [(groups, zeros)], "zero points")
        if "group index" in parts:
            require_shape(parts["group index"], [(inputs,)], "group index")
        return outputs, inputs

    def weight(self, name: str, values: Values) -> Tensor:
        codes_IO = _unpacked(values["main"], self.bits)
        zeros_GO = _unpacked(values["zero points"].mT, self.bits).mT
        zeros_GO = (zeros_GO + self.offset) & (2**self.bits - 1)  # 0 was stored as -1
        return _scaled(codes_IO, zeros_GO, values["scales"], values.get("group index"), self.group_size)


@dataclass(frozen=True)
class Awq:
    """``quant_method: awq`` (arXiv 2306.00978), version GEMM: weights and zero points packed along the outputs."""

    group_size: int

    title = "AWQ (4 bits)"
    layouts = (
        Layout(
            ".qweight",
            ".weight",
            {torch.int32},
            {"scales": (".scales",), "zero points": (".qzeros",)},
            reserved=(".scales",),  # of activations, whose module transformers replaces
        ),
    )
    of_activations = ()

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Awq:
        """Reads the group size. Raises ValueError for another version or other bits."""
        version = str(settings.get("version") or settings.get("format") or "gemm").lower()
        if version != "gemm":
            raise ValueError(f"version is {version!r}, expected gemm")
        return cls(_bits_and_group_size(settings, (4,))[1])

    def shape(self, name: str, parts: Parts) -> tuple[int, ...]:
        inputs, words = parts["main"].shape
        groups = _num_groups(inputs, self.group_size)
        require_shape(parts["scales"], [(groups, 8 * words)], f"scales (groups of {self.group_size} inputs)")
        require_shape(parts["zero points"], [(groups, words)], "zero points")
        return 8 * words, inputs

    def weight(self, name: str, values: Values) -> Tensor:
        codes_IO, zeros_GO = _columns(values["main"]), _columns(values["zero points"])
        return _scaled(codes_IO, zeros_GO, values["scales"], None, self.group_size)


@dataclass(frozen=True)
class BitNet:
    """``quant_method: bitnet`` (arXiv 2402.17764): -1, 0 and 1 in two bits each, four quarters of the rows in a byte.

    ``divides`` if weights are divided by their scale, as ``BitLinear`` of transformers does; ``AutoBitLinear``
    multiplies.
    """

    divides: bool

    title = "BitNet"
    layouts = (Layout(".weight", ".weight", {torch.uint8}, {"scale": (".weight_scale",)}),)
    of_activations = ()

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> BitNet:
        """Reads the class of linears. Raises ValueError for weights that are rounded anew in every run."""
        kind = settings.get("linear_class") or "bitlinear"
        if kind == "autobitlinear" and settings.get("quantization_mode") == "online":
            raise ValueError("quantization_mode is 'online', expected weights that are stored packed")
        if settings.get("use_rms_norm"):
            raise ValueError("use_rms_norm is true: its linears have norms of their own")
        return cls(divides=kind == "bitlinear")

    def shape(self, name: str, parts: Parts) -> tuple[int, ...]:
        require_shape(parts["scale"], [(1,), ()], "scale")
        rows, columns = parts["main"].shape
        return 4 * rows, columns

    def weight(self, name: str, values: Values) -> Tensor:
        codes = torch.cat([values["main"] >> shift & 3 for shift in (0, 2, 4, 6)]).float() - 1
        scale = values["scale"].float()
        return codes / scale if self.divides else codes * scale


def _bits_and_group_size(settings: Mapping[str, Any], allowed: tuple[int, ...]) -> tuple[int, int]:
    bits = settings.get("bits", settings.get("w_bit", 4))
    group_size = settings.get("group_size", settings.get("q_group_size", 128))
    if bits not in allowed:
        raise ValueError(f"bits are {bits}, expected {' or '.join(map(str, allowed))}")
    if not isinstance(group_size, int) or not (group_size == -1 or group_size > 0):
        raise ValueError(f"group_size is {group_size}, expected a positive integer, or -1 for one group")
    return bits, group_size


def _num_groups(inputs: int, group_size: int) -> int:
    return 1 if group_size == -1 else -(-inputs // group_size)


def _unpacked(words_PN: Tensor, bits: int) -> Tensor:
    """Unpacks the codes in the words of each column, from the lowest bit on; codes may reach into the next word."""
    if _WORD % bits == 0:
        shifts = torch.arange(0, _WORD, bits, dtype=torch.int32)
        return (words_PN[:, None] >> shifts[:, None] & (2**bits - 1)).flatten(0, 1)
    places = torch.arange(_WORD, dtype=torch.int32)
    binary = (words_PN[:, None] >> places[:, None] & 1).to(torch.uint8).flatten(0, 1)
    values = torch.tensor([1 << place for place in range(bits)], dtype=torch.int32)
    return (binary.unflatten(0, (-1, bits)) * values[:, None]).sum(1, dtype=torch.int32)


def _columns(words_RP: Tensor) -> Tensor:
    """Unpacks the columns of AWQ."""
    shifts = torch.tensor([4 * place for place in _AWQ_PLACES], dtype=torch.int32)
    return (words_RP[..., None] >> shifts & 15).flatten(-2)


def _scaled(codes_IO: Tensor, zeros_GO: Tensor, scales_GO: Tensor, group_I: Tensor | None, group_size: int) -> Tensor:
    """Weights (outputs x inputs): codes less the zero point of their group, times its scale."""
    if group_I is None:
        inputs = torch.arange(len(codes_IO))
        group_I = torch.zeros_like(inputs) if group_size == -1 else inputs // group_size
    group_I = group_I.long()
    return (codes_IO - zeros_GO[group_I]).float().mul_(scales_GO.float()[group_I]).mT
