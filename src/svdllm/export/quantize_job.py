"""What the formats of ``quantize`` have in common: the work to do, and the row that does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from svdllm.checkpoint.quantized import QuantizedLinear
from svdllm.checkpoint.tensors import Tensors
from svdllm.common.run_options import RunOptions
from svdllm.models.open import Source


@dataclass(frozen=True, kw_only=True)
class QuantizeJob:
    """A model to quantise: where it is, its skeleton, and the scheme of every linear that is quantised.

    folder: where its weights, config and companions are written.
    place: the device on which weights are rounded.
    """

    model: str | Path
    source: Source
    skeleton: PreTrainedModel
    linears: Sequence[QuantizedLinear[Any]]
    folder: Path
    place: torch.device
    options: RunOptions


@dataclass(frozen=True, kw_only=True)
class QuantizeFormat:
    """A row of ``FORMATS``: files that transformers loads by a package.

    Args:
        scheme: ``(bits, group_size)`` -> the scheme that linears get where their shape fits; raises InputError.
        require: ``(source, bits)`` -> raises InputError for a model that cannot be quantised so.
        num_bytes: ``(tensors of the source, linears)`` -> bytes of the quantised tensors, or an upper limit.
        in_memory: whether the whole model lies in memory on a CPU.
    """

    name: str
    summary: str
    package: str
    scheme: Callable[[int, int | None], Any]
    require: Callable[[Source, int], None]
    num_bytes: Callable[[Tensors, Sequence[QuantizedLinear[Any]]], int]
    in_memory: bool
    write: Callable[[QuantizeJob], None]
