"""Multiplies the factors of a checkpoint out to a plain model, and fills narrower MLPs up to one width."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedConfig

from svdllm.checkpoint.output import new_folder
from svdllm.checkpoint.shards import write_shards
from svdllm.checkpoint.tensors import tensor_bytes
from svdllm.common.errors import InputError, UnsupportedModelError
from svdllm.export.copies import config_to_export, require_intact
from svdllm.export.mlp_widths import Plain
from svdllm.export.rewritten import Rewritten
from svdllm.export.stored_linears import StoredLinears
from svdllm.models.companions import copy_companion_files
from svdllm.models.discover import discover
from svdllm.models.experts import Stacked, expert_tensors, stacked_layout
from svdllm.models.low_rank.factory import dense_config
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.low_rank.lowrank import split_experts
from svdllm.models.skeleton import build_skeleton
from svdllm.models.weights import SafetensorsWeights


class PlainMlps(NamedTuple):
    """The MLPs of a plain model: their width where it is less than the original's, and how many zeros fill up to it."""

    width: int | None
    filled_up: int


def export_dense(folder: str | Path, output_dir: str | Path) -> PlainMlps:
    """Writes a plain model of the base family, which loads everywhere.

    It is as large as the original, except where all MLPs are narrower: these get the width of the widest, if a config
    of the family can say so. Narrower ones are filled up with zeros, which change no output.

    Returns:
        The width of the MLPs, and how many of them were filled up.

    Raises:
        InputError: ``folder`` is not a checkpoint, or ``output_dir`` is not empty.
        CheckpointError: a file is truncated or altered.
        ResourceError: the disk is too small.
        UnsupportedModelError: the base family has no biases where bias correction added some, or no place for what a
            method of pruning has changed beside widths.
    """
    folder = Path(folder)
    config = config_to_export(folder)
    if (info := LowRankInfo.of(config)) is None:
        raise InputError(f"{folder} is already a dense model ({config.model_type}); it has no factors to multiply out.")
    if info.removed:
        raise UnsupportedModelError(
            f"{folder} cannot become a plain model of type {info.base_model_type}, which has no place for what pruning "
            f"changed ({', '.join(info.removed)} in its config.json). Use the checkpoint as it is."
        )
    with new_folder(output_dir, "an export") as (output, partial):
        require_intact(folder)
        original = _plain(dense_config(config), info)
        plain = original.as_wide_as(info.forms)
        skeleton = build_skeleton(config)
        split_experts(skeleton)  # those without a form, too: tensors are of single experts until they are written
        weights = SafetensorsWeights(folder, skeleton)
        tensors = Rewritten(
            weights, StoredLinears(weights, skeleton, info), plain.skeleton, info.forms, original.filled_parts
        )
        tensors.require_places()
        output.require_disk(tensor_bytes(tensors.layout), "the weights need")
        places = expert_tensors(plain.skeleton)
        write_shards(partial, Stacked(tensors, places), stacked_layout(tensors.layout, places))
        plain.config.save_pretrained(partial)
        copy_companion_files(folder, partial)
    return _mlps_of(original, plain, info)


def _plain(config: PreTrainedConfig, info: LowRankInfo) -> Plain:
    """The original model; its MLPs are looked for only if some linears of the checkpoint are smaller."""
    skeleton = build_skeleton(config)
    is_narrower = any({"in_features", "out_features"} & entry.keys() for entry in info.forms.values())
    return Plain(config, skeleton, discover(skeleton).mlps if is_narrower else ())


def _mlps_of(original: Plain, plain: Plain, info: LowRankInfo) -> PlainMlps:
    widths = zip(original.stored_widths(info.forms), plain.mlps, strict=True)
    filled_up = sum(width < mlp.width for width, mlp in widths)
    return PlainMlps(None if plain is original else plain.mlps[0].width, filled_up)
