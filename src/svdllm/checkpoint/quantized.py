"""The forms in which torchao stores a quantised linear, which one a linear gets, and the bytes of the files."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from typing_extensions import Self

from svdllm.checkpoint.tensors import Tensors
from svdllm.common.errors import InputError
from svdllm.models.linears import find_blocks, matches


@dataclass(frozen=True)
class Scheme:
    """A form of a quantised weight. ``group_size`` inputs share a scale; None stands for a whole row."""

    bits: int
    group_size: int | None = None

    def __str__(self) -> str:
        return f"{self.bits} bits, a scale per {f'{self.group_size} inputs' if self.group_size else 'row'}"

    def for_shape(self, out_features: int, in_features: int) -> Scheme:
        """This scheme where a weight of this shape has whole groups (of rows too, with NVFP4), else ``FALLBACK``."""
        rows = out_features % NVFP4_GROUP == 0 if self.bits == 4 else True
        return self if rows and in_features % (self.group_size or 1) == 0 else FALLBACK

    def num_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a quantised weight in a file, without the header.

        8 bits: a byte per weight, and five per scale (a float32 and a zero point). 4 bits: a byte per two weights
        (E2M1), a byte per scale (E4M3, in whole tiles of 128 rows x 4 groups), and one float32.
        """
        if self.bits == 4:
            tiles = -(-out_features // 128) * -(-in_features // (4 * NVFP4_GROUP))
            return out_features * in_features // 2 + 512 * tiles + 4
        return out_features * (in_features + 5 * (in_features // (self.group_size or in_features)))

    def torchao_config(self) -> Any:
        from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
        from torchao.quantization import Int8WeightOnlyConfig, PerGroup, PerRow

        if self.bits == 4:
            return NVFP4WeightOnlyConfig()
        granularity = PerRow() if self.group_size is None else PerGroup(self.group_size)
        return Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False)  # which is the whole process's


# For linears whose shape the scheme asked for does not fit. A scale per row fits every shape.
FALLBACK = Scheme(8)
# Bytes that torchao adds to headers for one weight, without its name: three entries in the file that holds it (281
# bytes in version 0.18), and a description of them in every file (302 bytes). With a margin for other versions.
ENTRY_BYTES = NOTE_BYTES = 400


class AnyScheme(Protocol):
    """What a scheme of any format is: it fits itself to the shape of a weight."""

    @property
    def group_size(self) -> int | None: ...

    def for_shape(self, out_features: int, in_features: int) -> Self: ...


S = TypeVar("S", bound=AnyScheme)


@dataclass(frozen=True, kw_only=True)
class QuantizedLinear(Generic[S]):
    """One linear to quantise; ``reason`` says why its scheme is not the one asked for."""

    name: str
    out_features: int
    in_features: int
    scheme: S
    reason: str | None = None


def quantized_linear(name: str, out_features: int, in_features: int, scheme: S) -> QuantizedLinear[S]:
    """A linear with the scheme asked for, or with the one that fits its shape."""
    fitting = scheme.for_shape(out_features, in_features)
    reason = None if fitting == scheme else f"{out_features} x {in_features} is not in groups of {scheme.group_size}"
    return QuantizedLinear(name=name, out_features=out_features, in_features=in_features, scheme=fitting, reason=reason)


def make_scheme(bits: int, group_size: int | None) -> Scheme:
    """The scheme of some options of ``quantize``. Raises InputError if there is none."""
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
    """Raises InputError if torchao cannot quantise weights of a dtype to 4 bits."""
    if bits == 4 and dtype not in (torch.bfloat16, torch.float32):
        raise InputError(
            f"{model} is stored in {str(dtype).removeprefix('torch.')}; 4 bits can be made of bfloat16 and float32 "
            "only. Use 8 bits, or re-save the model in bfloat16."
        )


def linears_in_blocks(skeleton: PreTrainedModel, scheme: S) -> list[QuantizedLinear[S]]:
    """All linears in the blocks that can be quantised, with the scheme of each."""
    blocks = _blocks(skeleton)
    return [
        quantized_linear(name, module.out_features, module.in_features, scheme)
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(blocks) and can_quantize(module.in_features)
    ]


def can_quantize(in_features: int) -> bool:
    """Whether a linear can be quantised. torchao cannot if there is one input, as in ``svd_u`` at rank 1."""
    return in_features > 1


def choose_schemes(
    skeleton: PreTrainedModel, scheme: S, skip: Sequence[str] = ()
) -> tuple[list[QuantizedLinear[S]], dict[str, str]]:
    """The linears to quantise with the scheme of each, and the linears and embeddings that are left with the reason.

    Embeddings and ``lm_head`` are outside the blocks, and left.

    Raises:
        InputError: a pattern of ``skip`` matches nothing, or everything.
        UnsupportedModelError: the model has no blocks that can be found.
    """
    blocks = _blocks(skeleton)
    found = {linear.name: linear for linear in linears_in_blocks(skeleton, scheme)}
    chosen: list[QuantizedLinear[S]] = []
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
            left[name] = f"{kind}, of which there is no form in few bits"
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


def quantized_bytes(tensors: Tensors, schemes: Mapping[str, Scheme], num_files: int) -> int:
    """An upper limit on the bytes of a quantised model's weight files, without the frame of their headers.

    Args:
        tensors: of the unquantised model.
        schemes: tensor name -> scheme, of the tensors that are quantised.
        num_files: the most files there will be. torchao describes every tensor in each of them.
    """
    result = 0
    for name, (shape, dtype) in tensors.items():
        result += schemes[name].num_bytes(*shape) if name in schemes else prod(shape) * dtype.itemsize
        result += ENTRY_BYTES + 3 * len(name) + num_files * (NOTE_BYTES + 2 * len(name))
    return result


def quantization_config(linears: Sequence[QuantizedLinear[Scheme]]) -> Any:
    """The config for transformers that gives each linear its scheme and leaves all other tensors."""
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
    """A regular expression, in torchao's syntax, that matches exactly the weights of these linears of the blocks.

    Linears that differ only in the number of their block share one alternative.
    """
    numbers: dict[tuple[str, str], list[str]] = {}
    for name in linears:
        head, number, tail = re.split(r"(?<=\.)(\d+)(?=\.)", name, maxsplit=1)
        numbers.setdefault((head, tail), []).append(number)
    kinds = (f"{re.escape(head)}({'|'.join(found)}){re.escape(tail)}" for (head, tail), found in numbers.items())
    return rf"re:({'|'.join(kinds)})\.weight"


def _blocks(skeleton: PreTrainedModel) -> tuple[str, ...]:
    """The prefixes of the names of everything inside the blocks."""
    return tuple(f"{block}." for block in find_blocks(skeleton))


# Inputs that share a scale in NVFP4, the only 4-bit form that torchao packs, saves and runs on every device.
NVFP4_GROUP = 16
