"""Heads that do nothing, so that a number of processes can share out all of them evenly (tensor parallelism).

A whole group more, one head of keys and values and those that ask it, has zero rows in q, k and v, and zero columns in
o: what it adds is zero times zero. Of a pair of factors these are rows of ``svd_u`` and columns of ``svd_v``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from svdllm.checkpoint.output import new_folder
from svdllm.checkpoint.reference import reference_logits
from svdllm.checkpoint.shards import write_shards
from svdllm.checkpoint.tensors import Tensors, tensor_bytes
from svdllm.common.errors import InputError, UnsupportedModelError, first_line
from svdllm.export.dense import config_to_export, require_intact
from svdllm.models.companions import copy_companion_files
from svdllm.models.linears import is_linear, linear_shape
from svdllm.models.logits import compare_logits
from svdllm.models.low_rank import family_classes, write_hashes
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.skeleton import build_skeleton
from svdllm.models.weights import SafetensorsWeights

FIXED_WIDTH = "the width of a head follows from their number there, whatever config.json says."


class Heads(NamedTuple):
    """Of an attention layer: heads in all, heads of keys and values, and the width of one."""

    all: int
    kv: int
    width: int

    def for_processes(self, number: int) -> Heads:
        """The fewest heads, in groups of the same size, that a number of processes can share out."""
        kv = -(-self.kv // number) * number
        return Heads(kv * self.all // self.kv, kv, self.width)


class Padding(NamedTuple):
    """What was made of which heads, and the largest difference of a logit as a share of the largest logit."""

    before: Heads
    after: Heads
    difference: float


def export_padded(folder: str | Path, output_dir: str | Path, processes: int) -> Padding:
    """Writes a copy of a model, compressed or not, with as many more heads as tensor parallelism asks for.

    It computes the same. Before the folder appears, the logits of a few tokens are computed from its files and from the
    original's, one block at a time.

    Raises:
        InputError: ``folder`` is no model, its heads can be shared out as they are, or ``output_dir`` is not empty.
        UnsupportedModelError: more heads would mean something else in this family, or the processes cannot share out
            what is not heads; nothing is written.
        CheckpointError: a file is truncated or altered.
    """
    folder = Path(folder)
    if processes < 2:
        raise InputError(f"Heads are padded for two processes or more, found {processes}.")
    config = config_to_export(folder)
    with new_folder(output_dir, "an export") as (output, partial):
        before = _heads(config)
        after = before.for_processes(processes)
        if after == before:
            raise InputError(
                f"{processes} processes can share out the {before.all} heads of {folder} ({before.kv} of keys and values) "
                "evenly; nothing is to be padded."
            )
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8")) | _fields(config, after)
        skeleton, padded = build_skeleton(config), _padded_skeleton(config, fields)
        shapes = _padded_shapes(skeleton, padded, before, after)
        _require_shares(padded, processes)
        require_intact(folder)
        tensors = _Padded(SafetensorsWeights(folder, skeleton), shapes)
        output.require_disk(tensor_bytes(tensors.layout), "the weights need")
        _write(tensors, fields, folder, config, partial)
        difference = _difference(folder, config, partial)
    return Padding(before, after, difference)


def _write(tensors: _Padded, fields: dict[str, Any], folder: Path, config: PreTrainedConfig, partial: Path) -> None:
    write_shards(partial, tensors, tensors.layout)
    (partial / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    copy_companion_files(folder, partial)
    if info := LowRankInfo.of(config):
        for name, text in family_classes(info.base_model_type).causal_lm.code_files().items():
            (partial / name).write_text(text, encoding="utf-8", newline="\n")
        write_hashes(partial)


def _heads(config: PreTrainedConfig) -> Heads:
    heads = getattr(config, "num_attention_heads", None)
    kv = getattr(config, "num_key_value_heads", None) or heads
    if not isinstance(heads, int) or not isinstance(kv, int) or heads % kv:
        raise _refused(config, "its config does not tell of one number of heads for all layers.")
    if isinstance(getattr(type(config), "head_dim", None), property):
        raise _refused(config, FIXED_WIDTH)
    return Heads(heads, kv, getattr(config, "head_dim", None) or config.hidden_size // heads)  # type: ignore[operator]


def _fields(config: PreTrainedConfig, heads: Heads) -> dict[str, int]:
    """What ``config.json`` says of heads. Their width has to be told: it no longer follows from their number."""
    fields = {"num_attention_heads": heads.all, "head_dim": heads.width}
    return fields | ({"num_key_value_heads": heads.kv} if hasattr(config, "num_key_value_heads") else {})


def _padded_skeleton(config: PreTrainedConfig, fields: dict[str, Any]) -> PreTrainedModel:
    try:
        return build_skeleton(type(config).from_dict(fields))
    except (ValueError, TypeError, StrictDataclassError, UnsupportedModelError) as error:
        raise _refused(config, f"transformers makes no such model ({first_line(error.__cause__ or error)}).") from error


def _padded_shapes(skeleton: PreTrainedModel, padded: PreTrainedModel, before: Heads, after: Heads) -> dict[str, Any]:
    """The shapes of all tensors of the padded model.

    Raises:
        UnsupportedModelError: something else than linears with one row or column for each number of a head has grown,
            or nothing has.
    """
    old = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    new = {name: tuple(tensor.shape) for name, tensor in padded.state_dict().items()}
    grown = [name for name in old if new[name] != old[name]]
    if not grown:
        raise _refused(skeleton.config, FIXED_WIDTH)
    widths = {(count * before.width, other * after.width) for count, other in zip(before[:2], after[:2], strict=True)}
    for name in grown:
        owner = skeleton.get_submodule(name.rpartition(".")[0])
        sizes = {pair for pair in zip(old[name], new[name], strict=True) if pair[0] != pair[1]}
        if not is_linear(owner) or not sizes <= widths:
            raise _refused(
                skeleton.config,
                f"{name} ({type(owner).__name__}) would grow from {old[name]} to {new[name]}. Known are heads that "
                "q, k, v and o alone have rows or columns of, in linears of their own.",
            )
    return new


def _require_shares(padded: PreTrainedModel, processes: int) -> None:
    """Raises UnsupportedModelError if the plan for tensor parallelism splits a width that the processes do not divide."""
    plan = padded.config.base_model_tp_plan or {}
    for name, module in padded.named_modules():
        rule = re.sub(r"\.\d+(?=\.|$)", ".*", name.removeprefix(f"{padded.base_model_prefix}."))
        if not is_linear(module) or (style := plan.get(rule)) is None:
            continue
        outputs, inputs = linear_shape(module)
        for split, width, ends in (("colwise", outputs, "outputs"), ("rowwise", inputs, "inputs")):
            if split in style and width % processes:
                raise UnsupportedModelError(
                    f"{processes} processes cannot share out the {width} {ends} of {name}, and only heads are padded. "
                    "Choose a number of processes that divides them."
                )


class _Padded:
    """The tensors of a model, with zeros behind them up to the shapes asked for."""

    def __init__(self, weights: SafetensorsWeights, shapes: dict[str, tuple[int, ...]]):
        self._weights = weights
        self.layout: Tensors = {name: (shapes[name], weights.shape_and_dtype(name)[1]) for name in weights.names()}

    def get(self, name: str) -> Tensor:
        tensor = self._weights.get(name)
        padded = tensor.new_zeros(self.layout[name][0])
        padded[tuple(slice(size) for size in tensor.shape)] = tensor
        return padded


def _difference(folder: Path, config: PreTrainedConfig, partial: Path) -> float:
    cpu = torch.device("cpu")
    _, expected = reference_logits(folder, config, cpu)
    _, found = reference_logits(partial, config_to_export(partial), cpu)
    return compare_logits(found, expected, lambda how: _refused(config, f"with them, {how}."))


def _refused(config: PreTrainedConfig, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"A model of type {config.model_type} cannot be given heads that do nothing: {why}")
