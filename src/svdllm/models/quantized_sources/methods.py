"""The methods of quantisation whose weights are dequantised on reading, and what a config says of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svdllm.common.errors import CheckpointError, SvdllmError, UnsupportedModelError, first_line
from svdllm.models.converted import Stored, StoredTensor
from svdllm.models.low_rank.lowrank import read_object
from svdllm.models.model_names import display_name
from svdllm.models.quantized_sources.compressed import CompressedTensors
from svdllm.models.quantized_sources.float8 import BlockScaledFloat8, RowScaledFloat8
from svdllm.models.quantized_sources.layout import Method, dequantized
from svdllm.models.quantized_sources.mxfp4 import Mxfp4
from svdllm.models.quantized_sources.packed_integers import Awq, BitNet, Gptq
from svdllm.models.safetensors_files import dtype_of, read_header, weight_files

METHODS: dict[str, Callable[[Mapping[str, Any]], Method]] = {
    "awq": Awq.of,
    "bitnet": BitNet.of,
    "compressed-tensors": CompressedTensors,
    "fbgemm_fp8": lambda settings: RowScaledFloat8(),
    "fp8": BlockScaledFloat8.of,
    "gptq": Gptq.of,
    "mxfp4": lambda settings: Mxfp4(),
    "mxfp8": BlockScaledFloat8.of,
}
# Methods that models are rounded with after training; in the others, models are published.
AFTER_TRAINING = frozenset({"awq", "compressed-tensors", "gptq"})


@dataclass(frozen=True)
class Quantization:
    """How a source is quantised, and the dtype that its weights are dequantised to when they are read.

    after_training: whether the weights were rounded from those of an original model.
    """

    method: Method
    dtype: torch.dtype
    after_training: bool


@dataclass(frozen=True)
class QuantizedSource:
    """What a plan and a report say of a quantised source; ``file_bytes`` of its weight files, None if not known."""

    method: str
    dtype: str
    file_bytes: int | None

    @property
    def text(self) -> str:
        return f"{self.method} source, dequantised to {self.dtype} on reading"


def quantization_of(folder: Path) -> Quantization | None:
    """How the weights of a folder are quantised, as far as they can be dequantised; None for other weights.

    Raises:
        InputError: a package that is needed is not installed.
        UnsupportedModelError: a variant of a known method is not known.
    """
    if not (folder / "config.json").is_file():
        return None
    fields = read_object(folder / "config.json")
    settings = quantization_settings(fields)
    name = str(settings.get("quant_method"))
    make = METHODS.get(name)
    if make is None:
        return None
    try:
        return Quantization(make(settings), _dtype(fields), name in AFTER_TRAINING)
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, SvdllmError):
            raise
        raise UnsupportedModelError(
            f"{display_name(folder)} is quantised ({settings['quant_method']}) in a way that svdllm does not know: "
            f"{first_line(error)}. Use the model that it was made of."
        ) from error


def quantization_settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The ``quantization_config`` in the fields of a config, or of the text model in it; empty if there is none."""
    text = fields.get("text_config")
    found = fields.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    return found if isinstance(found, dict) else {}


def tensors_in(folder: Path) -> dict[str, Stored]:
    """All tensors in the weight files of a folder, by their names there; quantised weights as dense ones.

    Raises:
        CheckpointError: a file is damaged, or what is stored of a quantised weight is incomplete.
        UnsupportedModelError: a tensor is of a dtype that models are not stored in.
    """
    stored: dict[str, Stored] = {
        key: StoredTensor(path, key, tensor.shape, dtype_of(path, key, tensor.code))
        for path in weight_files(folder)
        for key, tensor in read_header(path).tensors.items()
    }
    quantization = quantization_of(folder)
    if quantization is None:
        return stored
    try:
        return dequantized(stored, quantization.method, quantization.dtype)
    except ValueError as error:
        raise CheckpointError(
            f"{display_name(folder)}, {quantization.method.title}, cannot be dequantised: {first_line(error)}. The "
            "files and quantization_config in config.json do not belong together: fetch the model again."
        ) from error


def _dtype(fields: Mapping[str, Any]) -> torch.dtype:
    """The dtype of 16 bits that the config names; bfloat16 if it names none."""
    text = fields.get("text_config")
    for level in (fields, text if isinstance(text, dict) else {}):
        if "float16" in (level.get("dtype"), level.get("torch_dtype")):
            return torch.float16
    return torch.bfloat16
