"""Checks the source of an export, and writes a model folder with everything that it needs to load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from svdllm.checkpoint.reference import reference_logits
from svdllm.checkpoint.shards import write_shards
from svdllm.checkpoint.tensors import Tensors
from svdllm.common.errors import CheckpointError, InputError
from svdllm.models.companions import copy_companion_files
from svdllm.models.config_files import load_config
from svdllm.models.low_rank import HASHES_FILE, compare_hashes, family_classes, write_hashes
from svdllm.models.low_rank.info import LowRankInfo


def config_to_export(folder: Path) -> PreTrainedConfig:
    """Reads the config in a model's folder. Raises InputError if there is none."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is not an svdllm checkpoint: it has no config.json.")
    return load_config(folder, str(folder))


def require_intact(folder: Path) -> None:
    """Raises CheckpointError if the weights differ from the hashes in the folder."""
    problems = compare_hashes(folder, weights_only=True) if (folder / HASHES_FILE).is_file() else []
    if problems:
        raise CheckpointError(f"{folder} is not as it was written: {' '.join(problems)}")


def packed_linears(info: LowRankInfo | None) -> list[str]:
    """The packed linears of a low-rank model."""
    return [name for name, entry in info.forms.items() if entry["form"] == "packed"] if info else []


def write_model(
    partial: Path, tensors: Any, layout: Tensors, fields: dict[str, Any], folder: Path, info: LowRankInfo | None
) -> None:
    """Writes a model that loads: weights, config, the companions of ``folder``; of a low-rank model code and hashes.

    Args:
        tensors: has ``get(name)`` for every tensor of the layout.
        fields: the content of ``config.json``.
        info: of the low-rank model that is written; None for a dense one.
    """
    write_shards(partial, tensors, layout)
    (partial / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    copy_companion_files(folder, partial)
    if info is not None:
        family_classes(info.base_model_type).causal_lm.write_code_files(partial)
        write_hashes(partial)


def logits_of_both(folder: Path, config: PreTrainedConfig, partial: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of a few tokens by the copy in ``partial`` and by the original in ``folder``, in float32."""
    cpu = torch.device("cpu")
    _, expected = reference_logits(folder, config, cpu)
    _, found = reference_logits(partial, config_to_export(partial), cpu)
    return found, expected
