"""Reads GGUF files with the loader of transformers, and dequantises them into a folder of float32 safetensors."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
    read_field,
)

from svdllm.common.errors import InputError, UnsupportedModelError, first_line
from svdllm.common.files import save_tensors
from svdllm.models.low_rank.lowrank import sha256_of
from svdllm.models.skeleton import build_skeleton
from svdllm.models.tokenizer_files import load_tokenizer
from svdllm.models.unused_tensors import UnusedTensors

MARKER = "gguf-source.json"
FLOATING_TYPES = frozenset({"F16", "BF16", "F32", "F64"})
_PART = re.compile(r"-(\d{5})-of-(\d{5})$")


class GgufFile:
    """A GGUF file, whose header is read once.

    Raises:
        InputError: the file is damaged, one of several parts, or without a tokenizer.
    """

    def __init__(self, path: Path):
        self.path, self._reader = path, _read(path)
        _require_whole(path, self._reader)
        if not self._reader.fields.get("tokenizer.ggml.tokens"):
            raise InputError(
                f"{path.name} has no tokenizer in it (tokenizer.ggml.tokens). Convert the model again, with its own."
            )

    def config(self) -> PreTrainedConfig:
        """Makes the config that the file describes.

        Raises:
            UnsupportedModelError: transformers knows no model for its architecture.
        """
        path = self.path
        try:
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        except Exception as error:  # of any kind, by what is missing or wrong in the file
            if "architecture" in str(error) or "not supported" in str(error):
                raise UnsupportedModelError(f"{path.name}: {error}") from error
            raise InputError(f"{path.name} is not a readable GGUF file: {first_line(error)}") from error
        config.architectures = config.architectures or [_causal_lm_name(config)]
        config.dtype = torch.float32
        config.name_or_path = path.stem
        return config

    @property
    def quantized_as(self) -> str | None:
        """The types of quantised tensors in the file, as in ``GGUF: Q4_K, Q6_K``; None without any."""
        types = {tensor.tensor_type.name for tensor in self._reader.tensors} - FLOATING_TYPES
        return f"GGUF: {', '.join(sorted(types))}" if types else None

    def unused(self, skeleton: PreTrainedModel) -> UnusedTensors | None:
        """Finds the tensors of the file that transformers silently does not read; None if it reads all.

        Raises:
            UnsupportedModelError: the gguf package does not know the names of such a model's tensors.
        """
        from gguf import dequantize

        kind = TENSOR_PROCESSORS.get(str(read_field(self._reader, "general.architecture")[0]), TensorProcessor)
        processor = kind(config=skeleton.config.to_dict())
        # Without its modules, of which each is searched for other names: seconds, and needed by few architectures.
        alone = SimpleNamespace(config=skeleton.config, state_dict=skeleton.state_dict, named_children=list)
        names = {tensor.name for tensor in self._reader.tensors}
        try:
            if names <= set(get_gguf_hf_weights_map(alone, processor)):  # type: ignore[arg-type]
                return None
            places = get_gguf_hf_weights_map(skeleton, processor)
        except NotImplementedError as error:
            raise UnsupportedModelError(f"{self.path.name}: {first_line(error)}") from error

        def is_read(tensor: Any) -> bool:
            if tensor.name in places:
                return True
            # Some architectures have tensors of a form of their own.
            weights = dequantize(tensor.data, tensor.tensor_type)
            parsed = {"tensors": {}}
            name = processor.process(weights, tensor.name, tensor_key_mapping=places, parsed_parameters=parsed).name
            return name is None or name in places

        lost = [tensor.name for tensor in self._reader.tensors if not is_read(tensor)]
        shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in self._reader.tensors}
        return UnusedTensors.of(shapes, lost, set(shapes).difference(lost))


def gguf_config(path: Path) -> PreTrainedConfig:
    """Reads the config that a file describes; raises the errors of ``GgufFile`` and ``GgufFile.config``."""
    return GgufFile(path).config()


def convert_gguf(path: Path, config: PreTrainedConfig, folder: Path) -> None:
    """Writes weights, config, tokenizer and generation config; keeps a folder that was made of the same file.

    Raises:
        InputError: the weights or the tokenizer in the file are damaged, or of a kind that transformers does not read.
    """
    digest = sha256_of(path)
    marker = folder / MARKER
    if marker.is_file() and json.loads(marker.read_text())["sha256"] == digest:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with redirect_stderr(StringIO()):  # transformers draws a bar of its own per tensor
        tokenizer = load_tokenizer(path.name, None, path, offline=True)
        skeleton = build_skeleton(config, split=())
        try:
            tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=skeleton)["tensors"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError) as error:
            raise InputError(f"The weights in {path.name} cannot be read: {first_line(error)}") from error
        for name in list(tensors):
            tensors[name] = tensors[name].contiguous()
        save_tensors(tensors, folder / "model.safetensors")
        del tensors
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    marker.write_text(json.dumps({"sha256": digest}))


def _read(path: Path) -> Any:
    """Opens a GGUF file: its header, and the places of its tensors."""
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, OSError) as error:
        raise InputError(
            f"{path.name} is not a readable GGUF file, or is cut ({first_line(error)}). Fetch it again."
        ) from error


def _require_whole(path: Path, reader: Any) -> None:
    """Raises InputError for one of several parts of a model."""
    parts = int((read_field(reader, "split.count") or [1])[0])
    named = _PART.search(path.stem)
    if parts < 2 and named is None:
        return
    first = path.stem if named is None else _PART.sub(f"-00001-of-{named[2]}", path.stem)
    raise InputError(
        f"{path.name} is one of {max(parts, int(named[2]) if named else 0)} parts of a model, and transformers reads "
        f"GGUF files of one piece. Join them first, with llama.cpp: llama-gguf-split --merge {first}.gguf "
        f"{_PART.sub('', path.stem)}-whole.gguf"
    )


def _causal_lm_name(config: PreTrainedConfig) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "")
