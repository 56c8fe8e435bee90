"""Tiny models quantised by code of the tests' own, one value at a time, beside the dense models that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from families import tiny_model

SHAPES = {"vocab_size": 300, "intermediate_size": 64, "num_key_value_heads": 4}
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
Stored = dict[str, Tensor]  # end of a name -> what is stored
Quantizer = Callable[[Tensor, torch.Generator], tuple[Stored, Tensor]]  # also gives the weight that this stands for


class Case(NamedTuple):
    """A method: its family, its entry in the config, and what it makes of a weight whose name ends in ``ends``."""

    family: str
    settings: dict[str, Any]
    quantize: Quantizer
    ends: Sequence[str] = ("proj.weight",)
    dtype: torch.dtype = torch.bfloat16


def fp8(block: tuple[int, int], scale_name: str = ".weight_scale_inv", dtype: torch.dtype = torch.float32) -> Quantizer:
    def quantize(weight: Tensor, generator: torch.Generator) -> tuple[Stored, Tensor]:
        grid = [-(-size // length) for size, length in zip(weight.shape, block, strict=True)]
        scales, codes = torch.empty(grid), torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        dense = torch.empty_like(weight)
        for row, column in np.ndindex(*grid):
            place = (_span(row, block[0]), _span(column, block[1]))
            scale = (weight[place].abs().max() / 448).to(dtype).float()
            codes[place] = (weight[place] / scale).to(torch.float8_e4m3fn)
            dense[place] = codes[place].float() * scale
            scales[row, column] = scale
        return {".weight": codes, scale_name: scales.to(dtype)}, dense

    return quantize


def fp8_by_weight(weight: Tensor, generator: torch.Generator) -> tuple[Stored, Tensor]:
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale_inv": scale, ".activation_scale": scale.clone()}, codes.float() * scale


def fp8_by_row(weight: Tensor, generator: torch.Generator) -> tuple[Stored, Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scales).to(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale": scales}, codes.float() * scales


def fp4_by_group(weight: Tensor, generator: torch.Generator) -> tuple[Stored, Tensor]:
    """Two FP4 values per byte in groups of 32 inputs, whose scales are powers of two stored in a byte."""
    rows, columns = weight.shape
    codes = torch.randint(0, 16, weight.shape, generator=generator)
    powers = torch.randint(-8, -4, (rows, columns // 32), generator=generator)
    dense = torch.empty_like(weight)
    for row, column in np.ndindex(rows, columns):
        dense[row, column] = _fp4(int(codes[row, column])) * 2.0 ** int(powers[row, column // 32])
    packed = (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8).view(torch.int8)
    return {".weight": packed, ".weight_scale_inv": (powers + 127).to(torch.uint8)}, dense


def mxfp8(weight: Tensor, generator: torch.Generator) -> tuple[Stored, Tensor]:
    """FP8 in groups of 32 inputs, whose scales are powers of two stored in a byte."""
    powers = (weight.unflatten(1, (-1, 32)).abs().amax(-1) / 448).log2().ceil().int()
    scales = torch.tensor([[2.0 ** int(power) for power in row for _ in range(32)] for row in powers])
    codes = (weight / scales).to(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale_inv": (powers + 127).to(torch.uint8)}, codes.float() * scales


def mxfp4(weight: Tensor, generator: torch.Generator) -> tuple[Stored, Tensor]:
    """Random experts (experts x inputs x outputs), as gpt-oss has them."""
    experts, inputs, outputs = weight.shape
    codes = torch.randint(0, 16, (experts, outputs, inputs), generator=generator)
    powers = torch.randint(-8, -4, (experts, outputs, inputs // 32), generator=generator)
    dense = torch.empty_like(weight)
    for expert, output, source in np.ndindex(experts, outputs, inputs):
        value = _fp4(int(codes[expert, output, source])) * 2.0 ** int(powers[expert, output, source // 32])
        dense[expert, source, output] = value
    blocks = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8).reshape(*powers.shape, 16)
    return {"_blocks": blocks, "_scales": (powers + 127).to(torch.uint8)}, dense


def gptq(bits: int, group: int, *, shuffled: bool = False, offset: int = 1) -> Quantizer:
    def quantize(weight: Tensor, generator: torch.Generator) -> tuple[Stored, Tensor]:
        outputs, inputs = weight.shape
        length = inputs if group == -1 else group
        groups = torch.arange(inputs) // length
        if shuffled:
            groups = groups[torch.randperm(inputs, generator=generator)]
        codes, zeros, scales = _codes(weight, groups, bits, generator)
        dense = torch.empty_like(weight)
        for output, source in np.ndindex(outputs, inputs):
            place = int(groups[source]), output
            dense[output, source] = float(codes[source, output] - zeros[place]) * float(scales[place])
        stored = {
            ".qweight": _packed(codes.T, bits).T.contiguous(),
            ".qzeros": _packed((zeros - offset) % 2**bits, bits),
            ".scales": scales,
            ".g_idx": groups.int(),
        }
        return stored, dense

    return quantize


def awq(group: int) -> Quantizer:
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # the columns of a word, from the lowest bits on

    def in_order(codes: Tensor) -> Tensor:
        return codes.reshape(len(codes), -1, 8)[..., order].flatten(1)

    def quantize(weight: Tensor, generator: torch.Generator) -> tuple[Stored, Tensor]:
        outputs, inputs = weight.shape
        groups = torch.arange(inputs) // group
        codes, zeros, scales = _codes(weight, groups, 4, generator)
        dense = torch.empty_like(weight)
        for output, source in np.ndindex(outputs, inputs):
            place = int(groups[source]), output
            dense[output, source] = float(codes[source, output] - zeros[place]) * float(scales[place])
        stored = {".qweight": _packed(in_order(codes), 4), ".qzeros": _packed(in_order(zeros), 4), ".scales": scales}
        return stored, dense

    return quantize


def bitnet(weight: Tensor, generator: torch.Generator) -> tuple[Stored, Tensor]:
    codes = torch.randint(-1, 2, weight.shape, generator=generator)
    quarter = len(weight) // 4
    packed = sum((codes[place * quarter : (place + 1) * quarter] + 1) << 2 * place for place in range(4))
    scale = torch.tensor([37.0])
    assert isinstance(packed, Tensor)
    return {".weight": packed.to(torch.uint8), ".weight_scale": scale}, codes / 37.0


def pack_quantized(group: int) -> Quantizer:
    def quantize(weight: Tensor, generator: torch.Generator) -> tuple[Stored, Tensor]:
        rows, columns = weight.shape
        length = columns if group == -1 else group
        codes = torch.randint(-8, 8, weight.shape, generator=generator)
        scales = (0.01 + 0.02 * torch.rand(rows, columns // length, generator=generator)).bfloat16()
        dense = codes * scales.float().repeat_interleave(length, dim=1)
        shape = torch.tensor(weight.shape)
        return {".weight_packed": _packed(codes + 8, 4), ".weight_scale": scales, ".weight_shape": shape}, dense

    return quantize


def int_quantized(weight: Tensor, generator: torch.Generator) -> tuple[Stored, Tensor]:
    codes = torch.randint(-128, 128, weight.shape, generator=generator)
    scales = (0.001 + 0.001 * torch.rand(len(weight), 1, generator=generator)).bfloat16()
    return {".weight": codes.to(torch.int8), ".weight_scale": scales}, codes * scales.float()


def float_quantized(weight: Tensor, generator: torch.Generator) -> tuple[Stored, Tensor]:
    codes = (448 * (2 * torch.rand(weight.shape, generator=generator) - 1)).to(torch.float8_e4m3fn)
    scales = (1e-4 + 1e-4 * torch.rand(1, generator=generator)).bfloat16()
    return {".weight": codes, ".weight_scale": scales, ".input_scale": scales.clone()}, codes.float() * scales.float()


def _scheme(**weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_GPTQ = {"quant_method": "gptq", "desc_act": False, "sym": False}
_EXPERTS = ("gate_up_proj", "down_proj")
CASES = {
    "fp8": Case("deepseek_v3", _FP8 | {"weight_block_size": [8, 20]}, fp8((8, 20))),
    "fp8 scale": Case("llama", _FP8 | {"weight_block_size": [16, 16]}, fp8((16, 16), ".scale", torch.float8_e8m0fnu)),
    "fp8 whole": Case("llama", _FP8 | {"weight_block_size": None}, fp8_by_weight),
    "fp8 fp4": Case("llama", _FP8 | {"weight_block_size": [128, 128]}, fp4_by_group),
    "mxfp8": Case("llama", {"quant_method": "mxfp8", "weight_block_size": [1, 32]}, mxfp8),
    "fbgemm_fp8": Case("llama", {"quant_method": "fbgemm_fp8"}, fp8_by_row),
    "mxfp4": Case("gpt_oss", {"quant_method": "mxfp4"}, mxfp4, _EXPERTS),
    "gptq 4": Case("llama", _GPTQ | {"bits": 4, "group_size": 16}, gptq(4, 16), dtype=torch.float16),
    "gptq 3": Case("llama", _GPTQ | {"bits": 3, "group_size": -1}, gptq(3, -1), dtype=torch.float16),
    "gptq 8": Case("qwen3_moe", _GPTQ | {"bits": 8, "group_size": 8}, gptq(8, 8)),
    "gptq shuffled": Case("llama", _GPTQ | {"bits": 2, "group_size": 16}, gptq(2, 16, shuffled=True)),
    "gptq v2": Case(
        "llama", _GPTQ | {"bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}, gptq(4, 32, offset=0)
    ),
    "awq": Case(
        "llama", {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}, awq(16), dtype=torch.float16
    ),
    "bitnet": Case("llama", {"quant_method": "bitnet"}, bitnet),
}
COMPRESSED_TENSORS = {
    "pack-quantized": Case(
        "llama",
        _scheme(num_bits=4, type="int", strategy="group", group_size=16) | {"format": "pack-quantized"},
        pack_quantized(16),
    ),
    "pack-quantized experts": Case(
        "qwen3_moe",
        _scheme(num_bits=4, type="int", strategy="channel") | {"format": "pack-quantized"},
        pack_quantized(-1),
    ),
    "int-quantized": Case(
        "llama", _scheme(num_bits=8, type="int", strategy="channel") | {"format": "int-quantized"}, int_quantized
    ),
    "float-quantized": Case(
        "llama", _scheme(num_bits=8, type="float", strategy="tensor") | {"format": "float-quantized"}, float_quantized
    ),
    "naive-quantized": Case(
        "llama", _scheme(num_bits=8, type="float", strategy="tensor") | {"format": "naive-quantized"}, float_quantized
    ),
}


def write_models(case: Case, folder: Path) -> tuple[Path, Path]:
    """Writes a quantised model and the dense model of its dequantised weights; returns their folders."""
    quantized, dense = folder / "quantized", folder / "dense"
    shapes = {**SHAPES, "num_local_experts": 2, "num_hidden_layers": 1} if case.family == "gpt_oss" else SHAPES
    model = tiny_model(case.family, **shapes).to(case.dtype)
    for place in (quantized, dense):
        model.save_pretrained(place)
    generator = torch.Generator().manual_seed(3)
    kept, stored = {}, {}
    for name, weight in load_file(dense / "model.safetensors").items():
        if name.endswith(tuple(case.ends)):
            parts, value = case.quantize(weight.float(), generator)
            stored |= {name.removesuffix(".weight") + end: part.contiguous() for end, part in parts.items()}
            kept[name] = value.to(case.dtype)
        else:
            stored[name] = kept[name] = weight
    save_file(kept, dense / "model.safetensors", {"format": "pt"})
    save_file(stored, quantized / "model.safetensors", {"format": "pt"})
    set_config(quantized, quantization_config=case.settings)
    return quantized, dense


def set_config(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def change_tensors(folder: Path, change: Callable[[Stored], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _codes(weight: Tensor, groups: Tensor, bits: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes (inputs x outputs), and zero points and scales (groups x outputs)."""
    outputs, inputs = weight.shape
    count = int(groups.max()) + 1
    codes = torch.randint(0, 2**bits, (inputs, outputs), generator=generator)
    zeros = torch.randint(0, 2**bits, (count, outputs), generator=generator)
    return codes, zeros, (0.001 + 0.02 * torch.rand(count, outputs, generator=generator)).half()


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Packs each row as one large integer, the first code in its lowest bits."""

    def words(row: Sequence[int]) -> Iterator[int]:
        number = sum(code << bits * place for place, code in enumerate(row))
        yield from np.frombuffer(number.to_bytes(len(row) * bits // 8, "little"), dtype="<i4").tolist()

    return torch.tensor([list(words(row)) for row in codes.tolist()], dtype=torch.int32)


def _fp4(code: int) -> float:
    return -FP4[code - 8] if code >= 8 else FP4[code]


def _span(index: int, length: int) -> slice:
    return slice(index * length, (index + 1) * length)
