"""The tensors of a model, read one at a time by the names they have in its ``state_dict``, whatever the files say."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from svdllm.disk import naming
from svdllm.errors import CheckpointError, InputError, NumericalError, UnsupportedModelError, first_line

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Weights(Protocol):
    """The tensors of a model by their name in its ``state_dict``; tied tensors are there once."""

    def names(self) -> list[str]: ...

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]: ...

    def get(self, name: str) -> Tensor: ...


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors file with the permissions of an ordinary new file (the library gives it to its owner only).

    Raises:
        OSError: it could not be written, for instance because the disk is full. There is no file then.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        with naming(path):
            save_file(tensors, path, metadata={"format": "pt"})
    except OSError:
        path.unlink(missing_ok=True)
        raise
    path.chmod(mode)


def survey(weights: Weights, progress: Callable[[int, int], None] | None = None) -> str:
    """Reads every tensor once: the fingerprint of their names, dtypes, shapes and bytes.

    Raises:
        NumericalError: a weight is NaN or infinite; names the tensor.
    """
    digest = hashlib.sha256()
    names = weights.names()
    for done, name in enumerate(names):
        tensor = weights.get(name).detach().cpu().contiguous()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise NumericalError(
                f"The weights are damaged: {name} has {bad} values of {tensor.numel()} that are NaN or infinite."
            )
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        if progress is not None:
            progress(done + 1, len(names))
    return digest.hexdigest()


class SafetensorsWeights:
    """The safetensors files of a folder; nothing is held open or in memory between two reads.

    Raises:
        CheckpointError: a file is missing or truncated, or a tensor of the model is in none of them.
        UnsupportedModelError: there are only pickled weights, or tensors in a layout that needs converting.
    """

    def __init__(self, folder: Path, skeleton: PreTrainedModel):
        self._place: dict[str, tuple[Path, str, tuple[int, ...], torch.dtype]] = {}
        renaming = _renaming(skeleton)
        expected = skeleton.state_dict()
        unknown: list[str] = []
        for path in weight_files(folder):
            for key, shape, dtype in _header(path):
                name = renaming(key)
                if name in expected:
                    self._place[name] = (path, key, shape, dtype)
                else:
                    unknown.append(key)
        self._settle_ties(skeleton)
        _require_all(self, skeleton, folder.name, unknown)

    def names(self) -> list[str]:
        return list(self._place)

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return self._place[name][2:]

    def get(self, name: str) -> Tensor:
        path, key, *_ = self._place[name]
        # A copy, so that the mapping of the file (which counts as resident memory) ends with this call.
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(key).clone()

    def _settle_ties(self, skeleton: PreTrainedModel) -> None:
        """A tied tensor is kept once, under the name that the others are tied to, whatever the files hold.

        Raises:
            UnsupportedModelError: the files hold both, and they differ.
        """
        for name, origin in (getattr(skeleton, "all_tied_weights_keys", None) or {}).items():
            if name not in self._place:
                continue
            if origin not in self._place:
                self._place[origin] = self._place[name]
            elif not torch.equal(self.get(name), self.get(origin)):
                raise UnsupportedModelError(
                    f"The config ties {name} to {origin}, but the files hold different values for them. Set "
                    "tie_word_embeddings to false in config.json if both are meant."
                )
            del self._place[name]


class MemoryWeights:
    """The tensors of a model in memory; they are read, never changed.

    Raises:
        InputError: they are not those of a causal language model of its config (an adapter, a bare model).
    """

    def __init__(self, model: PreTrainedModel, skeleton: PreTrainedModel):
        self._tensors: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_meta:
                raise InputError(f"{name} is on the meta device: load the model with its weights first.")
            if id(tensor) not in seen:
                self._tensors[name] = tensor.detach()
            seen.add(id(tensor))
        _require_all(self, skeleton, type(model).__name__, sorted(set(self._tensors) - set(skeleton.state_dict())))

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return tuple(self._tensors[name].shape), self._tensors[name].dtype

    def get(self, name: str) -> Tensor:
        return self._tensors[name]


def _require_all(weights: Weights, skeleton: PreTrainedModel, holder: str, unknown: Sequence[str]) -> None:
    """Raises CheckpointError unless every tensor of the skeleton is there, in its shape (tied ones once)."""
    expected = skeleton.state_dict()
    stored = set(weights.names())
    tied = set(getattr(skeleton, "all_tied_weights_keys", None) or ())
    missing = [name for name in expected if name not in stored and name not in tied]
    if missing:
        raise CheckpointError(
            f"{holder}: {len(missing)} tensors of {type(skeleton).__name__} are missing, for instance "
            f"{', '.join(missing[:3])}{f'; unknown there: {unknown[0]}' if unknown else ''}. If transformers can load "
            "the model, re-save it with save_pretrained (an adapter merged) and compress that folder."
        )
    for name in stored & set(expected):
        shape, wanted = weights.shape_and_dtype(name)[0], tuple(expected[name].shape)
        if shape != wanted:
            raise CheckpointError(f"{holder}: {name} has shape {shape}, the config asks for {wanted}.")


def weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index.name} in {folder.name} is damaged: {first_line(error)}") from error
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder.name} lacks {', '.join(missing)}, which {index.name} lists. Fetch it again."
            )
        return [folder / name for name in files]
    files = [folder / "model.safetensors"] if (folder / "model.safetensors").is_file() else []
    if files:
        return files
    other = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".h5")]
    if other:
        raise UnsupportedModelError(
            f"{folder.name} has no safetensors weights, only {', '.join(sorted(other)[:3])}; pickled files are never "
            "read. Re-save the model with transformers' save_pretrained and compress that folder."
        )
    raise InputError(f"{folder.name} has a config.json but no model.safetensors: its weights are missing.")


def _header(path: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Names, shapes and dtypes, after a check that the file is as long as its header says."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        size = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        # Also lets the library check what a plain read cannot see.
        with safe_open(path, framework="pt"):
            pass
    except (struct.error, ValueError, KeyError, OverflowError, MemoryError, SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path.name} in {path.parent.name} is truncated or damaged ({first_line(error)}). Fetch or write it again."
        ) from error
    if size != path.stat().st_size:
        raise CheckpointError(f"{path.name} is damaged: {size} bytes expected, {path.stat().st_size} found.")
    for key, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise UnsupportedModelError(f"{path.name}: {key} is of dtype {entry['dtype']}, which is not supported.")
        yield key, tuple(entry["shape"]), _DTYPES[entry["dtype"]]


def _renaming(skeleton: PreTrainedModel) -> Callable[[str], str]:
    """Name in a file -> name in the model, by transformers' own rules."""
    transforms = get_model_conversion_mapping(skeleton)
    renamings = [rule for rule in transforms if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in transforms if isinstance(rule, WeightConverter)]
    if converters:
        raise UnsupportedModelError(
            f"transformers converts the weights of {type(skeleton).__name__} while it loads them (stacked or split "
            "tensors); such models are not supported yet."
        )
    expected = skeleton.state_dict()
    prefix = skeleton.base_model_prefix

    def rename(key: str) -> str:
        return rename_source_key(key, renamings, [], prefix, expected)[0]

    return rename
