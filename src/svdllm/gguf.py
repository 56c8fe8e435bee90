"""GGUF files, read with transformers' own loader and dequantised to an ordinary folder of float32 safetensors."""

from __future__ import annotations

import json
import shutil
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from svdllm.errors import InputError, UnsupportedModelError
from svdllm.modeling.lowrank import sha256_of
from svdllm.weights import save_tensors

MARKER = "gguf-source.json"


def gguf_config(path: Path) -> PreTrainedConfig:
    """The config that the file describes.

    Raises:
        InputError: the file is damaged.
        UnsupportedModelError: transformers knows no model for its architecture.
    """
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, IndexError, OSError) as error:
        if "architecture" in str(error) or "not supported" in str(error):
            raise UnsupportedModelError(f"{path.name}: {error}") from error
        raise InputError(f"{path.name} is not a readable GGUF file: {error}") from error
    config.architectures = config.architectures or [_causal_lm_name(config)]
    config.dtype = torch.float32
    config.name_or_path = path.stem
    return config


def convert_gguf(path: Path, config: PreTrainedConfig, folder: Path) -> None:
    """Writes weights, config, tokenizer and generation config; a folder made of the same file before is kept."""
    from svdllm.source import build_skeleton

    digest = sha256_of(path)
    marker = folder / MARKER
    if marker.is_file() and json.loads(marker.read_text())["sha256"] == digest:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with redirect_stderr(StringIO()):  # transformers draws a bar of its own per tensor
        tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=build_skeleton(config))["tensors"]
        for name in list(tensors):
            tensors[name] = tensors[name].contiguous()
        save_tensors(tensors, folder / "model.safetensors")
        del tensors
        config.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer.save_pretrained(folder)
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    marker.write_text(json.dumps({"sha256": digest}))


def _causal_lm_name(config: PreTrainedConfig) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "")
