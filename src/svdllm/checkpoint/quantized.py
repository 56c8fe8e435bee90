"""How torchao stores a linear in few bits: the forms there are, which one a linear gets, and what files then hold."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from svdllm.checkpoint.tensors import Notes, Tensors
from svdllm.common.errors import InputError
from svdllm.models.linears import find_blocks, matches


@dataclass(frozen=True)
class Scheme:
    """A form of a weight. ``group_size`` inputs share a scale; None is a whole row."""

    bits: int
    group_size: int | None = None

    def __str__(self) -> str:
        return f"{self.bits} bits, a scale per {f'{self.group_size} inputs' if self.group_size else 'row'}"

    def fits(self, out_features: int, in_features: int) -> bool:
        """Whether a weight of this shape has whole groups; NVFP4 wants its rows in sixteens too."""
        rows = out_features % NVFP4_GROUP == 0 if self.bits == 4 else True
        return rows and in_features % (self.group_size or 1) == 0

    def tensors(self, linear: str, out_features: int, in_features: int) -> Tensors:
        """What a file holds in place of ``<linear>.weight``.

        8 bits: integers, float32 scales and a zero point of a byte beside each. 4 bits: pairs of E2M1 numbers, their
        scales in E4M3 in tiles of 128 x 4, and one float32.
        """
        start = f"{linear}._weight_"
        if self.bits == 4:
            tiles = (-(-out_features // 128) * 32, -(-in_features // (4 * NVFP4_GROUP)) * 16)
            return {
                f"{start}qdata": ((out_features, in_features // 2), torch.uint8),
                f"{start}scale": (tiles, torch.float8_e4m3fn),
                f"{start}per_tensor_scale": ((), torch.float32),
            }
        groups = (out_features, in_features // (self.group_size or in_features))
        return {
            f"{start}qdata": ((out_features, in_features), torch.int8),
            f"{start}scale": (groups, torch.float32),
            f"{start}zero_point": (groups, torch.int8),
        }

    def note(self, in_features: int, dtype: torch.dtype) -> str:
        """What torchao writes into the header of a file on such a weight, and reads again; ``dtype`` is of the source."""
        kind = {"_type": "torch.dtype", "_data": str(dtype).removeprefix("torch.")}
        if self.bits == 4:
            form = {"is_swizzled_scales": True, "use_triton_kernel": False, "act_quant_kwargs": None}
            form |= {"block_size": NVFP4_GROUP, "orig_dtype": kind}
            return _note("NVFP4Tensor", form, ["per_tensor_scale", "qdata", "scale"])
        form = {"act_quant_kwargs": None, "reduce_range": False}
        form |= {"block_size": [1, self.group_size or in_features], "dtype": kind}
        return _note("Int8Tensor", form, ["zero_point", "qdata", "scale"])

    def torchao_config(self) -> Any:
        from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
        from torchao.quantization import Int8WeightOnlyConfig, PerGroup, PerRow

        if self.bits == 4:
            return NVFP4WeightOnlyConfig()
        granularity = PerRow() if self.group_size is None else PerGroup(self.group_size)
        return Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False)  # which is the whole process's


# What a linear gets that the scheme asked for does not fit: any shape has rows.
FALLBACK = Scheme(8)
# What torchao writes into the header of a file on a tensor that is as it was.
PLAIN_NOTE = json.dumps({"_type": "Tensor"})


@dataclass(frozen=True, kw_only=True)
class QuantizedLinear:
    """One linear in few bits; ``reason`` is why it has another scheme than was asked for."""

    name: str
    out_features: int
    in_features: int
    scheme: Scheme
    reason: str | None = None


def quantized_linear(name: str, out_features: int, in_features: int, scheme: Scheme) -> QuantizedLinear:
    """A linear with the scheme asked for, or with one that fits its shape."""
    reason = None
    if not scheme.fits(out_features, in_features):
        reason = f"{out_features} x {in_features} is not in groups of {scheme.group_size}"
        scheme = FALLBACK
    return QuantizedLinear(name=name, out_features=out_features, in_features=in_features, scheme=scheme, reason=reason)


def make_scheme(bits: int, group_size: int | None) -> Scheme:
    """The scheme that was asked for. Raises InputError if there is none of these numbers."""
    if bits not in (4, 8):
        raise InputError(f"--bits {bits} is not possible: weights are stored in 8 or in 4 bits.")
    if bits == 4 and group_size not in (None, NVFP4_GROUP):
        raise InputError(
            f"--group-size {group_size} is not possible with --bits 4: there {NVFP4_GROUP} inputs share a scale "
            "(NVFP4). Leave it out."
        )
    if group_size is not None and group_size < 1:
        raise InputError(f"--group-size must be at least 1, found {group_size}.")
    return Scheme(bits, NVFP4_GROUP if bits == 4 else group_size)


def require_dtype(bits: int, dtype: torch.dtype, model: str) -> None:
    """Raises InputError for 4 bits of what torchao makes none of."""
    if bits == 4 and dtype not in (torch.bfloat16, torch.float32):
        raise InputError(
            f"{model} is stored in {str(dtype).removeprefix('torch.')}; 4 bits can be made of bfloat16 and float32 only. "
            "Use 8 bits, or re-save the model in bfloat16."
        )


def linears_in_blocks(skeleton: PreTrainedModel, scheme: Scheme) -> list[QuantizedLinear]:
    """All that torchao has a form of, if none is left as it is."""
    blocks = _blocks(skeleton)
    return [
        quantized_linear(name, module.out_features, module.in_features, scheme)
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(blocks) and can_quantize(module.in_features)
    ]


def can_quantize(in_features: int) -> bool:
    """Whether torchao has a form of a linear: of one input, as the second factor of rank 1 has it, there is none."""
    return in_features > 1


def choose_schemes(
    skeleton: PreTrainedModel, scheme: Scheme, skip: Sequence[str] = ()
) -> tuple[list[QuantizedLinear], dict[str, str]]:
    """The linears of the blocks with the scheme of each, and what is left as it is with the reason.

    Embeddings and ``lm_head`` are outside the blocks, and left.

    Raises:
        InputError: a pattern of ``skip`` matches nothing, or everything.
        UnsupportedModelError: there are no blocks to be found.
    """
    blocks = _blocks(skeleton)
    found = {linear.name: linear for linear in linears_in_blocks(skeleton, scheme)}
    chosen: list[QuantizedLinear] = []
    left: dict[str, str] = {}
    names: list[str] = []
    for name, module in skeleton.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            continue
        if not name.startswith(blocks):
            left[name] = "outside the blocks"
            continue
        names.append(name)
        if any(matches(pattern, name) for pattern in skip):
            left[name] = "--skip"
        elif name not in found:
            kind = type(module).__name__ if not isinstance(module, nn.Linear) else "a linear of one input"
            left[name] = f"{kind}, of which torchao has no form"
        else:
            chosen.append(found[name])
    for pattern in skip:
        if not any(matches(pattern, name) for name in names):
            raise InputError(
                f"--skip {pattern!r} matches none of the {len(names)} linears; they are named like "
                f"{', '.join(names[:3])}."
            )
    if not chosen:
        reasons = sorted({left[name] for name in names})
        raise InputError(f"Nothing is left to quantise: {len(names)} linears in the blocks ({', '.join(reasons)}).")
    return chosen, left


def file_notes(names: Iterable[str], linears: Iterable[QuantizedLinear], dtype: torch.dtype) -> Notes:
    """What headers say of these tensors of a model in few bits, tied ones among them; ``dtype`` is of the source."""
    notes = {f"{linear.name}.weight": linear.scheme.note(linear.in_features, dtype) for linear in linears}
    return {name: notes.get(name, PLAIN_NOTE) for name in names}


def quantized_tensors(stored: Tensors, linears: Iterable[QuantizedLinear]) -> Tensors:
    """What the files of a quantised model hold, from what those of the model itself do."""
    by_weight = {f"{linear.name}.weight": linear for linear in linears}
    result: Tensors = {}
    for name, entry in stored.items():
        linear = by_weight.get(name)
        if linear is None:
            result[name] = entry
        else:
            result |= linear.scheme.tensors(linear.name, linear.out_features, linear.in_features)
    return result


def quantization_config(linears: Sequence[QuantizedLinear]) -> Any:
    """transformers' config of a model in which each linear has its scheme; other weights, and biases, are left."""
    from torchao.quantization import FqnToConfig
    from transformers import TorchAoConfig

    by_scheme: dict[Scheme, list[str]] = {}
    for linear in linears:
        by_scheme.setdefault(linear.scheme, []).append(linear.name)
    return TorchAoConfig(
        FqnToConfig(
            OrderedDict((weights_pattern(names), scheme.torchao_config()) for scheme, names in by_scheme.items())
        )
    )


def weights_pattern(linears: Sequence[str]) -> str:
    """The regular expression, as torchao writes them, of exactly the weights of these linears of the blocks.

    Those that differ in the number of their block only are written once.
    """
    numbers: dict[tuple[str, str], list[str]] = {}
    for name in linears:
        head, number, tail = re.split(r"(?<=\.)(\d+)(?=\.)", name, maxsplit=1)
        numbers.setdefault((head, tail), []).append(number)
    kinds = (f"{re.escape(head)}({'|'.join(found)}){re.escape(tail)}" for (head, tail), found in numbers.items())
    return rf"re:({'|'.join(kinds)})\.weight"


def _blocks(skeleton: PreTrainedModel) -> tuple[str, ...]:
    """How the names of what is inside the blocks begin."""
    return tuple(f"{block}." for block in find_blocks(skeleton))


def _note(kind: str, form: dict[str, Any], parts: list[str]) -> str:
    return json.dumps({"_type": kind, "_data": form, "_tensor_data_names": parts})


# Inputs that share a scale in NVFP4, the only form of four bits that torchao packs, saves and runs on every device.
NVFP4_GROUP = 16
