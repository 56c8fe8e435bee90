"""Reads the tensors of a model one at a time, by their names in its ``state_dict``, however files name them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from svdllm.common.errors import CheckpointError, InputError, NumericalError, UnsupportedModelError
from svdllm.models.model_names import display_name
from svdllm.models.safetensors_files import dtype_of, read_header, weight_files
from svdllm.models.unused_tensors import UnusedTensors, unused_tensors, warn_of_unused


class Weights(Protocol):
    """The tensors of a model by their names in its ``state_dict``; tied tensors once."""

    def names(self) -> list[str]: ...

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]: ...

    def get(self, name: str) -> Tensor: ...


def survey(weights: Weights, buffers: Collection[str] = (), progress: Callable[[int, int], None] | None = None) -> str:
    """Reads every tensor once and returns a SHA-256 (hex) of all names, dtypes, shapes and bytes.

    ``buffers`` names the tensors that are not parameters. They may be infinite, as limits that were never set are.

    Raises:
        NumericalError: a weight is NaN or infinite; names the tensor.
    """
    digest = hashlib.sha256()
    names = weights.names()
    for done, name in enumerate(names):
        tensor = weights.get(name).detach().cpu().contiguous()
        bad_values = tensor.isnan() if name in buffers else ~tensor.isfinite()
        if tensor.is_floating_point() and bool(bad_values.any()):
            raise NumericalError(
                f"The weights are damaged: {name} has {int(bad_values.sum())} values of {tensor.numel()} that are NaN "
                "or infinite."
            )
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        if progress is not None:
            progress(done + 1, len(names))
    return digest.hexdigest()


class SafetensorsWeights:
    """The tensors in the safetensors files of a folder. No file stays open, and nothing stays in memory, between reads.

    Raises:
        CheckpointError: a file is missing or truncated, or a tensor of the model is in none of them.
        UnsupportedModelError: the weights are pickled, or in a layout that transformers converts.
    """

    def __init__(self, folder: Path, skeleton: PreTrainedModel):
        self._place: dict[str, tuple[Path, str, tuple[int, ...], torch.dtype]] = {}
        if _converters(skeleton):
            raise UnsupportedModelError(
                f"transformers converts the weights of {type(skeleton).__name__} while it loads them (stacked or split "
                "tensors); such models are not supported yet."
            )
        headers = {path: read_header(path) for path in weight_files(folder)}
        shapes = {key: tensor.shape for header in headers.values() for key, tensor in header.tensors.items()}
        names = _names_in(skeleton, shapes)
        expected = skeleton.state_dict()
        for path, header in headers.items():
            for key, tensor in header.tensors.items():
                if names[key] in expected:
                    self._place[names[key]] = (path, key, tensor.shape, dtype_of(path, key, tensor.code))
        self._settle_ties(skeleton)
        unknown = [key for key in shapes if names[key] not in expected]
        _require_all(self, skeleton, display_name(folder), unknown)
        self.unused = unused_tensors(shapes, names, skeleton)
        warn_of_unused(display_name(folder), self.unused)

    def names(self) -> list[str]:
        return list(self._place)

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return self._place[name][2:]

    def get(self, name: str) -> Tensor:
        path, key, *_ = self._place[name]
        # A copy, so that the file is mapped only during this call: its pages count as resident memory.
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(key).clone()

    def _settle_ties(self, skeleton: PreTrainedModel) -> None:
        """Keeps a tied tensor once, under the name that the others are tied to.

        Raises:
            UnsupportedModelError: the files hold several of its names, with different values.
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
    """The tensors of a model in memory, which are read and never changed.

    Raises:
        InputError: they do not belong to a causal language model of its config (an adapter, a bare model).
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
        holder = type(model).__name__
        shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        for name in (unknown := sorted(set(shapes).difference(skeleton.state_dict()))):
            del self._tensors[name]
        _require_all(self, skeleton, holder, unknown)
        self.unused = unused_tensors(shapes, {name: name for name in shapes}, skeleton)
        warn_of_unused(holder, self.unused)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return tuple(self._tensors[name].shape), self._tensors[name].dtype

    def get(self, name: str) -> Tensor:
        return self._tensors[name]


def _require_all(weights: Weights, skeleton: PreTrainedModel, holder: str, unknown: Sequence[str]) -> None:
    """Raises CheckpointError unless every tensor of the skeleton is there, tied ones once, in the right shape."""
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


def unused_in(folder: Path, model: PreTrainedModel) -> UnusedTensors | None:
    """The tensors in a folder's files that a model loaded from it does not use; None if it uses all."""
    headers = map(read_header, weight_files(folder))
    shapes = {key: tensor.shape for header in headers for key, tensor in header.tensors.items()}
    return unused_tensors(shapes, _names_in(model, shapes), model)


def _converters(model: PreTrainedModel) -> list[WeightConverter]:
    """The rules by which transformers joins or splits the tensors in files while it loads a model."""
    return [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightConverter)]


def _names_in(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Maps names in files to names in the model, by the rules of transformers in its order: one may enable another."""
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    converters = _converters(model)
    expected, prefix = model.state_dict(), model.base_model_prefix
    names = {}
    for key in sorted(keys, key=dot_natural_key):
        names[key] = rename_source_key(key, renamings, converters, prefix, expected)[0]
        if names[key] not in expected and key in expected:
            names[key] = rename_source_key(key, [], [], prefix, expected)[0]
    return names
