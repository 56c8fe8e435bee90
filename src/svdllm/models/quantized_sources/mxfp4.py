"""MXFP4 experts (gpt-oss): groups of 32 inputs in 16 bytes, with one power of two for each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from svdllm.models.quantized_sources.layout import Layout, Parts, Values, require_shape


@dataclass(frozen=True)
class Mxfp4:
    """``quant_method: mxfp4``: stacked experts, whose weights the model has transposed (experts, inputs, outputs)."""

    title: str = "MXFP4"

    layouts = (Layout("_blocks", "", {torch.uint8}, {"scale": ("_scales",)}),)
    of_activations = ()

    def shape(self, name: str, parts: Parts) -> tuple[int, ...]:
        blocks = parts["main"].shape
        if len(blocks) != 4:
            raise ValueError(f"it has shape {blocks}, expected (experts, outputs, groups, bytes)")
        require_shape(parts["scale"], [blocks[:-1]], "scales")
        return blocks[0], blocks[2] * blocks[3] * 2, blocks[1]

    def weight(self, name: str, values: Values) -> Tensor:
        return convert_moe_packed_tensors(values["main"], values["scale"])  # exact in bfloat16: two bits of mantissa
