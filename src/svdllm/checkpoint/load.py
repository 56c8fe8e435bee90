"""Loads a model, compressed or not, with the errors of svdllm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from svdllm.common.errors import CheckpointError, SvdllmError
from svdllm.models.companions import GENERATION_CONFIG
from svdllm.models.config_files import load_config
from svdllm.models.converted import Stored
from svdllm.models.hub import hub_folder
from svdllm.models.low_rank.families import auto_class
from svdllm.models.low_rank.lowrank import unpacking_one_by_one
from svdllm.models.model_names import display_name
from svdllm.models.open import open_config
from svdllm.models.quantized_sources.methods import quantization_of, tensors_in
from svdllm.models.safetensors_files import read_header, weight_files
from svdllm.models.skeleton import build_skeleton
from svdllm.models.unused_tensors import warn_of_unused
from svdllm.models.weights import unused_in


def load_model(model: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Loads a model, compressed or not, by ``from_pretrained``.

    Weights that others have quantised are dequantised on reading, as far as the method is known.

    Args:
        model: a folder, a hub id, or a GGUF file.
        kwargs: for ``from_pretrained``. Only safetensors are read, and code that comes with a model is not run.

    Warns of tensors in the files that the model does not use (``UnusedTensorsWarning``).

    Raises:
        CheckpointError: a file is missing, truncated or altered; names it.
        InputError: no such model.
        UnsupportedModelError: it is not a causal language model.
    """
    want_info = kwargs.pop("output_loading_info", False)
    place, model_type = _place_of(model, kwargs)
    try:
        with unpacking_one_by_one():
            is_quantized = "gguf_file" not in kwargs and quantization_of(place) is not None
            both = _load_dequantized(place, kwargs) if is_quantized else _load(place, model_type, kwargs)
    except (MemoryError, torch.OutOfMemoryError, SvdllmError):
        raise
    except Exception as error:  # of any kind, by the class of the model and what is wrong in its files
        raise CheckpointError(f"{model} cannot be loaded: {type(error).__name__}: {error}") from error
    loaded, info = both
    _require_loaded(model, loaded, info)
    if "gguf_file" not in kwargs and getattr(loaded, "hf_quantizer", None) is None:
        warn_of_unused(display_name(model), unused_in(place, loaded))
    dtype = kwargs.get("dtype")
    if isinstance(dtype, torch.dtype) and is_torchao(loaded):
        loaded.to(dtype)  # a weight of 4 bits unpacks to the dtype it was stored with
    return both if want_info else loaded


def _load(place: Path, model_type: str, kwargs: dict[str, Any]) -> Any:
    """Loads a model with its loading info."""
    settings = {"trust_remote_code": False, "use_safetensors": True, "ignore_mismatched_sizes": True} | kwargs
    return auto_class(model_type).from_pretrained(str(place), output_loading_info=True, **settings)


def _load_dequantized(place: Path, kwargs: dict[str, Any]) -> Any:
    """Loads a quantised model as the dense model that it stands for, one weight after the other."""
    config = load_config(place, str(place))
    tensors = {key: _Lazy(tensor) for key, tensor in tensors_in(place).items()}
    settings = {"dtype": config.dtype, "ignore_mismatched_sizes": True} | kwargs
    family: Any = type(build_skeleton(config, split=()))
    loaded, info = family.from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True, **settings)
    loaded.name_or_path = str(place)
    if loaded.can_generate() and (place / GENERATION_CONFIG).is_file():
        loaded.generation_config = GenerationConfig.from_pretrained(place)
    return loaded, info


class _Lazy:
    """A stored tensor that is read when transformers takes its values, as it does of the slices of safetensors."""

    def __init__(self, stored: Stored):
        self._stored = stored

    def __getitem__(self, index: Any) -> Tensor:
        return self._stored.read()[index]


def _require_loaded(model: str | Path, loaded: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Raises CheckpointError where the files lack a weight and transformers made a random one."""
    misshapen = [
        f"{name} (in the file {list(found)}, by the config {list(wanted)})"
        for name, found, wanted in info["mismatched_keys"]
    ]
    for what, names in (("missing", info["missing_keys"]), ("of another shape", misshapen)):
        if names:
            raise CheckpointError(
                f"{model}: {len(names)} tensors of {type(loaded).__name__} are {what}, for instance "
                f"{', '.join(sorted(names)[:3])}. The files and config.json do not belong together: fetch the model "
                "again."
            )


def _place_of(model: str | Path, kwargs: dict[str, Any]) -> tuple[Path, str]:
    """Checks a model as every command does, and returns the folder for ``from_pretrained`` and the model type.

    Removes the arguments for the hub from ``kwargs``, and adds the name of a GGUF file.
    """
    path = Path(model)
    if path.is_file():
        kwargs["gguf_file"] = path.name
        return path.parent, open_config(path).config.model_type
    if not path.is_dir():
        offline, revision = kwargs.pop("local_files_only", False), kwargs.pop("revision", None)
        path = hub_folder(str(model), revision, offline, weights=True)
    config = load_config(path, str(model), allow_quantized=True)
    for file in weight_files(path):
        read_header(file)
    return path, config.model_type


def is_torchao(model: PreTrainedModel) -> bool:
    """Whether a model was quantised by torchao."""
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer is not None and quantizer.quantization_config.quant_method == "torchao"
