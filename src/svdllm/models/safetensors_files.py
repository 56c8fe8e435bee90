"""Finds the weight files of a model and reads their headers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from svdllm.common.errors import CheckpointError, InputError, UnsupportedModelError, first_line
from svdllm.models.low_rank.lowrank import weight_file_names
from svdllm.models.model_names import display_name

# The dtypes of safetensors, in the order in which its writer lays tensors out.
SAFETENSORS_CODES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in SAFETENSORS_CODES.items()}
if hasattr(torch, "float8_e8m0fnu"):  # powers of two, the scales of some quantised models
    _DTYPES["F8_E8M0"] = torch.float8_e8m0fnu

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".h5")
_OF_WEIGHTS = (".safetensors", *_PICKLED)


def weight_files(folder: Path) -> list[Path]:
    """Lists the weight files of a folder that transformers reads (``weight_file_names``).

    Raises:
        InputError: the folder has no weight files.
        CheckpointError: one is missing, or the index or config that names them is damaged.
        UnsupportedModelError: the weights are in another format.
    """
    name = display_name(folder)
    try:
        files = weight_file_names(folder)
    except ValueError as error:
        raise CheckpointError(f"{name} cannot be read: {first_line(error)} Fetch or write it again.") from error
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise CheckpointError(
            f"{name} lacks {', '.join(missing)}, named by its index or by transformers_weights in config.json. Fetch "
            "it again."
        )
    if files:
        return [folder / file for file in files]
    _refuse_other_weights(folder, name)
    raise InputError(
        f"{name} has a config.json but no model.safetensors: its weights are missing, or pickled; pickled files are "
        "never read."
    )


def holds_weights(folder: Path) -> bool:
    """Whether a folder has weight files of any format, or an index of them."""
    return any(path.name.endswith((*_OF_WEIGHTS, ".index.json")) for path in folder.iterdir())


def _refuse_other_weights(folder: Path, name: str) -> None:
    """Raises UnsupportedModelError for weights under other names or in other formats than transformers reads."""
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    if others := [file for file in files if file.endswith(".safetensors")]:
        raise UnsupportedModelError(
            f"{name} has no model.safetensors, only {', '.join(others[:3])}, which transformers does not read either. "
            "If it holds the weights of this config, rename it; else fetch the model in the format of transformers."
        )
    if pickled := [file for file in files if file.endswith(_PICKLED)]:
        raise UnsupportedModelError(
            f"{name} has no safetensors weights, only {', '.join(pickled[:3])}; pickled files are never read. Re-save "
            "the model with transformers' save_pretrained and compress that folder."
        )


class StoredTensor(NamedTuple):
    """The entry of a tensor in a header; ``code`` is its dtype, such as ``BF16``."""

    shape: tuple[int, ...]
    code: str
    num_bytes: int


class Header(NamedTuple):
    """The header of a safetensors file: its tensors by name, and its metadata."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Reads the header of a safetensors file.

    Raises:
        CheckpointError: the file is truncated or damaged.
    """
    try:
        with safe_open(path, framework="pt"):  # checks the header, and the length of the file by it
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path.name} in {display_name(path.parent)} is truncated or damaged ({first_line(error)}). Fetch or write "
            "it again."
        ) from error
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    tensors = {
        key: StoredTensor(tuple(entry["shape"]), entry["dtype"], entry["data_offsets"][1] - entry["data_offsets"][0])
        for key, entry in header.items()
    }
    return Header(tensors, metadata)


def dtype_of(path: Path, key: str, code: str) -> torch.dtype:
    """The dtype of a tensor of a file. Raises UnsupportedModelError for one that models are not stored in."""
    if code not in _DTYPES:
        raise UnsupportedModelError(f"{path.name}: {key} is of dtype {code}, which is not supported.")
    return _DTYPES[code]
