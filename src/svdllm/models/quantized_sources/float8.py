"""FP8 weights with a scale per block, per row or per weight, and FP4 experts beside them (DeepSeek, MiniMax, Llama)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.mxfp4 import FP4_VALUES

from svdllm.models.quantized_sources.layout import FLOAT8, Layout, Parts, Values, require_shape

FP4_GROUP = 32  # inputs that share a scale in weights of two FP4 values per byte
Block = tuple[int, int]
_PACKED = frozenset({torch.int8})


@dataclass(frozen=True)
class BlockScaledFloat8:
    """``quant_method: fp8`` of transformers: float8 weights times the scale of their block of ``block`` values.

    ``block`` is None where a weight has one scale. Blocks at the lower and right edge may be incomplete.
    """

    title: str
    block: Block | None

    layouts = (
        Layout(
            ".weight",
            ".weight",
            FLOAT8 | _PACKED,
            {"scale": (".weight_scale_inv", ".scale", ".qscale_weight")},
        ),
        Layout("", "", FLOAT8 | _PACKED, {"scale": ("_scale_inv",)}),
    )
    of_activations = (".activation_scale", ".input_scale", ".qscale_act")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> BlockScaledFloat8:
        """Reads the size of a block. Raises ValueError if it is not two positive numbers."""
        method = str(settings["quant_method"])
        block = settings.get("weight_block_size", (1, FP4_GROUP) if method == "mxfp8" else (128, 128))
        if block is not None and (len(block) != 2 or not all(isinstance(size, int) and size > 0 for size in block)):
            raise ValueError(f"weight_block_size is {block}, expected two positive integers or null")
        return cls(method.upper(), None if block is None else (block[0], block[1]))

    def shape(self, name: str, parts: Parts) -> tuple[int, ...]:
        shape = _unpacked_shape(parts)
        *stack, rows, columns = shape
        block = self._block(parts["main"].dtype)
        if block is None:
            require_shape(parts["scale"], _one_each(stack), "scale")
        elif parts["scale"].shape != ():  # else one scale for the weight
            height, width = block
            require_shape(parts["scale"], [(*stack, -(-rows // height), -(-columns // width))], "scale")
        return shape

    def weight(self, name: str, values: Values) -> Tensor:
        weight = _floats(values["main"])
        scale = _scales(values["scale"])
        block = self._block(values["main"].dtype)
        if block is None or scale.ndim == 0:
            return weight.mul_(scale.reshape(*scale.shape[:1], *[1] * (weight.ndim - 1)))
        height, width = block
        rows, columns = weight.shape[-2:]
        by_row = scale.repeat_interleave(height, dim=-2)[..., :rows, :]
        return weight.mul_(by_row.repeat_interleave(width, dim=-1)[..., :columns])

    def _block(self, stored: torch.dtype) -> Block | None:
        """The size of a block of a weight whose codes are stored in a dtype."""
        return (1, FP4_GROUP) if stored in _PACKED else self.block


@dataclass(frozen=True)
class RowScaledFloat8:
    """``quant_method: fbgemm_fp8``: float8 weights times the scale of their row."""

    title: str = "FBGEMM FP8"

    layouts = (Layout(".weight", ".weight", FLOAT8, {"scale": (".weight_scale",)}),)
    of_activations = (".input_scale_ub",)

    def shape(self, name: str, parts: Parts) -> tuple[int, ...]:
        shape = parts["main"].shape
        require_shape(parts["scale"], [(shape[0], 1)], "scale")
        return shape

    def weight(self, name: str, values: Values) -> Tensor:
        return values["main"].float().mul_(values["scale"].float())


def _unpacked_shape(parts: Parts) -> tuple[int, ...]:
    main = parts["main"]
    if len(main.shape) < 2:
        raise ValueError(f"it has shape {main.shape}, expected a matrix")
    return (*main.shape[:-1], 2 * main.shape[-1]) if main.dtype in _PACKED else main.shape


def _one_each(stack: list[int]) -> list[tuple[int, ...]]:
    """Shapes of one scale per matrix."""
    return [tuple(stack) + (1,) * ones for ones in range(3)]


def _floats(stored: Tensor) -> Tensor:
    """float32 values of FP8, or of two FP4 values per byte, the lower four bits first."""
    if stored.dtype not in _PACKED:
        return stored.float()
    table = torch.tensor(FP4_VALUES)
    codes = stored.view(torch.uint8)
    return torch.stack([table[(codes & 15).int()], table[(codes >> 4).int()]], dim=-1).flatten(-2)


def _scales(stored: Tensor) -> Tensor:
    """float32 values of scales, which may be stored as the exponents of powers of two (E8M0)."""
    return (stored.float() - 127).exp2() if stored.dtype == torch.uint8 else stored.float()
