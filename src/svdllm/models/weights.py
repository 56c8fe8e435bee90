"""Reads the tensors of a model one at a time, by their names in its ``state_dict``, however files name them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from svdllm.common.errors import CheckpointError, InputError, NumericalError, UnsupportedModelError, first_line
from svdllm.models.converted import Conversion, Stored, StoredPart, converted_tensors
from svdllm.models.experts import ExpertTensor, Places, expert_tensors, known_tensors, split_tensors
from svdllm.models.model_names import display_name
from svdllm.models.quantized_sources.layout import FLOAT8
from svdllm.models.quantized_sources.methods import tensors_in
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

    Tensors that transformers joins or splits while it loads a model are joined or split when they are read, and
    quantised ones are dequantised.

    Raises:
        CheckpointError: a file is missing or truncated, or a tensor of the model is in none of them.
        UnsupportedModelError: the weights are pickled, quantised in a way that is not known, or do not fit the rules by
            which transformers joins them.
    """

    def __init__(self, folder: Path, skeleton: PreTrainedModel):
        stored = tensors_in(folder)
        shapes = {key: tensor.shape for key, tensor in stored.items()}
        places = _places_in(skeleton, shapes)
        expected = known_tensors(skeleton)
        self._tensors: dict[str, Stored] = {
            name: stored[key] for key, (name, rule, _) in places.items() if rule is None and name in expected
        }
        conversions = _conversions(
            skeleton, {key: place for key, place in places.items() if place[0] in expected}, stored
        )
        try:
            self._tensors |= converted_tensors(conversions)
        except Exception as error:  # of any kind, by what is wrong with the tensors
            raise UnsupportedModelError(
                f"The weights in {display_name(folder)} do not fit the rules by which transformers joins those of "
                f"{type(skeleton).__name__}: {first_line(error)}"
            ) from error
        self._settle_ties(skeleton)
        experts = expert_tensors(skeleton)
        _require_counts({name: tensor.shape for name, tensor in self._tensors.items()}, experts, display_name(folder))
        self._tensors = split_tensors(
            self._tensors,
            experts,
            lambda stack, place: StoredPart(stack, place.index, place.transposed),
        )
        names = {key: name for key, (name, _, _) in places.items()}
        unknown = [key for key in shapes if names[key] not in expected]
        _require_all(self, skeleton, display_name(folder), unknown)
        self.unused = unused_tensors(shapes, names, skeleton)
        warn_of_unused(display_name(folder), self.unused)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return self._tensors[name].shape, self._tensors[name].dtype

    def get(self, name: str) -> Tensor:
        return self._tensors[name].read()

    def _settle_ties(self, skeleton: PreTrainedModel) -> None:
        """Keeps a tied tensor once, under the name that the others are tied to.

        Raises:
            UnsupportedModelError: the files hold several of its names, with different values.
        """
        for name, origin in (getattr(skeleton, "all_tied_weights_keys", None) or {}).items():
            if name not in self._tensors:
                continue
            if origin not in self._tensors:
                self._tensors[origin] = self._tensors[name]
            elif not torch.equal(self.get(name), self.get(origin)):
                raise UnsupportedModelError(
                    f"The config ties {name} to {origin}, but the files hold different values for them. Set "
                    "tie_word_embeddings to false in config.json if both are meant."
                )
            del self._tensors[name]


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
        for name in (unknown := sorted(set(shapes).difference(known_tensors(skeleton)))):
            del self._tensors[name]
        experts = expert_tensors(skeleton)
        _require_counts(shapes, experts, holder)
        self._tensors = split_tensors(self._tensors, experts, _part_of)
        _require_all(self, skeleton, holder, unknown)
        self.unused = unused_tensors(shapes, {name: name for name in shapes}, skeleton)
        warn_of_unused(holder, self.unused)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return tuple(self._tensors[name].shape), self._tensors[name].dtype

    def get(self, name: str) -> Tensor:
        return self._tensors[name]


def _part_of(stack: Tensor, place: ExpertTensor) -> Tensor:
    return stack[place.index].mT if place.transposed else stack[place.index]


def _require_counts(shapes: Mapping[str, tuple[int, ...]], places: Places, holder: str) -> None:
    """Raises CheckpointError unless every stacked tensor holds as many experts as the config asks for."""
    for name, count in Counter(place.stacked for place in places.values()).items():
        if name in shapes and shapes[name][0] != count:
            raise CheckpointError(
                f"{holder}: {name} holds {shapes[name][0]} experts, the config asks for {count}. Weights and config do "
                "not belong together: fetch or write the model again."
            )


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
        if (dtype := weights.shape_and_dtype(name)[1]) in FLOAT8:
            raise UnsupportedModelError(
                f"{holder}: {name} is of dtype {str(dtype).removeprefix('torch.')}, but config.json has no "
                "quantization_config that says how it is to be read. Use the model that it was made of."
            )
        shape, wanted = weights.shape_and_dtype(name)[0], tuple(expected[name].shape)
        if shape != wanted:
            raise CheckpointError(f"{holder}: {name} has shape {shape}, the config asks for {wanted}.")


def unused_in(folder: Path, model: PreTrainedModel) -> UnusedTensors | None:
    """The tensors in a folder's files that a model loaded from it does not use; None if it uses all."""
    shapes = {key: tensor.shape for key, tensor in tensors_in(folder).items()}
    names = {key: name for key, (name, _, _) in _places_in(model, shapes).items()}
    return unused_tensors(shapes, names, model)


Place = tuple[str, WeightConverter | None, str | None]  # name in the model, the rule that makes it, its pattern


def _places_in(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, Place]:
    """Maps names in files to places in the model, by the rules of transformers in its order: one may enable another.

    Of a rule that makes several tensors, the name is that of the first.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    own, expected, prefix = model.state_dict(), known_tensors(model), model.base_model_prefix
    places: dict[str, Place] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in own and key in own:
            name, pattern = rename_source_key(key, [], [], prefix, expected)
        places[key] = (name, None if pattern is None else by_pattern[pattern], pattern)
    return places


def _conversions(model: PreTrainedModel, places: Mapping[str, Place], stored: Mapping[str, Stored]) -> list[Conversion]:
    """Gathers the stored tensors that one use of a rule needs."""
    gathered: dict[str, tuple[WeightConverter, list[tuple[str, str, Stored]]]] = {}
    for key, (name, rule, pattern) in places.items():
        if rule is not None and pattern is not None:
            gathered.setdefault(name, (rule, []))[1].append((pattern, key, stored[key]))
    return [Conversion(model, rule, name, sources) for name, (rule, sources) in gathered.items()]
