"""Pads a model with attention heads that compute zero, so that their number is divisible by a number of processes.

Tensor parallelism needs this. Heads are added in whole groups: one head of keys and values with the query heads that
read it. Their rows in q, k and v and their columns in o are zero. In a pair of factors these are rows of ``svd_u`` and
columns of ``svd_v``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from svdllm.checkpoint.output import new_folder
from svdllm.checkpoint.tensors import Tensors, tensor_bytes
from svdllm.common.errors import InputError, UnsupportedModelError, first_line
from svdllm.export.copies import config_to_export, logits_of_both, packed_linears, require_intact, write_model
from svdllm.models.linears import is_linear, linear_shape
from svdllm.models.logits import compare_logits
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.skeleton import build_skeleton
from svdllm.models.weights import SafetensorsWeights
from svdllm.models.wrapped import refuse_wrapper

FIXED_WIDTH = "it computes the width of a head from the number of heads, whatever config.json says."


class Heads(NamedTuple):
    """The heads of an attention layer: all of them, those of keys and values, and the width of one."""

    all: int
    kv: int
    width: int

    def for_processes(self, number: int) -> Heads:
        """The fewest heads, in groups of the same size, that a number of processes can share evenly."""
        kv = -(-self.kv // number) * number
        return Heads(kv * self.all // self.kv, kv, self.width)


class Padding(NamedTuple):
    """The heads before and after, and the largest difference of a logit as a share of the largest logit."""

    before: Heads
    after: Heads
    difference: float


def export_padded(folder: str | Path, output_dir: str | Path, processes: int) -> Padding:
    """Writes a copy of a model, compressed or not, with enough heads for tensor parallelism over ``processes``.

    The copy computes the same: its logits of a few tokens are compared with the original's before the folder appears.

    Raises:
        InputError: ``folder`` is not a model, its heads need no padding, or ``output_dir`` is not empty.
        UnsupportedModelError: heads cannot be added in this family, or a width other than that of heads is not
            divisible by the number of processes; nothing is written.
        CheckpointError: a file is truncated or altered.
    """
    folder = Path(folder)
    if processes < 2:
        raise InputError(f"Heads are padded for two processes or more, found {processes}.")
    config = config_to_export(folder)
    info = LowRankInfo.of(config)
    _refuse_packed(folder, info)
    refuse_wrapper(config, str(folder), "--format padded")
    with new_folder(output_dir, "an export") as (output, partial):
        before = _heads(config)
        after = before.for_processes(processes)
        if after == before:
            raise InputError(
                f"{processes} processes can share the {before.all} heads of {folder} ({before.kv} of keys and values) "
                "evenly; there is nothing to pad."
            )
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8")) | _fields(config, after)
        skeleton, padded = build_skeleton(config), _padded_skeleton(config, fields)
        shapes = _padded_shapes(skeleton, padded, before, after)
        _require_shares(padded, processes)
        require_intact(folder)
        tensors = _Padded(SafetensorsWeights(folder, skeleton), shapes)
        output.require_disk(tensor_bytes(tensors.layout), "the weights need")
        write_model(partial, tensors, tensors.layout, fields, folder, info)
        difference = compare_logits(
            *logits_of_both(folder, config, partial), lambda how: _refused(config, f"with them, {how}.")
        )
    return Padding(before, after, difference)


def _refuse_packed(folder: Path, info: LowRankInfo | None) -> None:
    """Raises InputError for packed linears, which tensor parallelism cannot split."""
    if packed := packed_linears(info):
        raise InputError(
            f"{folder} has {len(packed)} packed linears, such as {packed[0]}, and processes cannot share these. Run "
            f"`svdllm export {folder} -o PAIRS --format pairs` first, and pad PAIRS."
        )


def _heads(config: PreTrainedConfig) -> Heads:
    heads = getattr(config, "num_attention_heads", None)
    kv = getattr(config, "num_key_value_heads", None) or heads
    if not isinstance(heads, int) or not isinstance(kv, int) or heads % kv:
        raise _refused(config, "its config does not give one number of heads for all layers.")
    if isinstance(getattr(type(config), "head_dim", None), property):
        raise _refused(config, FIXED_WIDTH)
    return Heads(heads, kv, getattr(config, "head_dim", None) or config.hidden_size // heads)  # type: ignore[operator]


def _fields(config: PreTrainedConfig, heads: Heads) -> dict[str, int]:
    """The entries of ``config.json`` on heads, with their width, which no longer follows from their number."""
    fields = {"num_attention_heads": heads.all, "head_dim": heads.width}
    return fields | ({"num_key_value_heads": heads.kv} if hasattr(config, "num_key_value_heads") else {})


def _padded_skeleton(config: PreTrainedConfig, fields: dict[str, Any]) -> PreTrainedModel:
    try:
        return build_skeleton(type(config).from_dict(fields))
    except (ValueError, TypeError, StrictDataclassError, UnsupportedModelError) as error:
        raise _refused(config, f"transformers cannot build it ({first_line(error.__cause__ or error)}).") from error


def _padded_shapes(skeleton: PreTrainedModel, padded: PreTrainedModel, before: Heads, after: Heads) -> dict[str, Any]:
    """The shapes of all tensors of the padded model.

    Raises:
        UnsupportedModelError: no tensor grew, or one grew that is not the weight or bias of a linear with a row or
            column for every number of a head.
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
                f"{name} ({type(owner).__name__}) would grow from {old[name]} to {new[name]}. Only models in which q, "
                "k, v and o are linears of their own, and nothing else depends on heads, can be padded.",
            )
    return new


def _require_shares(padded: PreTrainedModel, processes: int) -> None:
    """Raises UnsupportedModelError if tensor parallelism splits a width that is not divisible by ``processes``."""
    plan = padded.config.base_model_tp_plan or {}
    for name, module in padded.named_modules():
        rule = re.sub(r"\.\d+(?=\.|$)", ".*", name.removeprefix(f"{padded.base_model_prefix}."))
        if not is_linear(module) or (style := plan.get(rule)) is None:
            continue
        outputs, inputs = linear_shape(module)
        for split, width, ends in (("colwise", outputs, "outputs"), ("rowwise", inputs, "inputs")):
            if split in style and width % processes:
                raise UnsupportedModelError(
                    f"{processes} processes cannot share the {width} {ends} of {name} evenly, and only heads are "
                    f"padded. Choose a number of processes that divides {width}."
                )


class _Padded:
    """The tensors of a model, with zeros appended up to the given shapes."""

    def __init__(self, weights: SafetensorsWeights, shapes: dict[str, tuple[int, ...]]):
        self._weights = weights
        self.layout: Tensors = {name: (shapes[name], weights.shape_and_dtype(name)[1]) for name in weights.names()}

    def get(self, name: str) -> Tensor:
        tensor = self._weights.get(name)
        padded = tensor.new_zeros(self.layout[name][0])
        padded[tuple(slice(size) for size in tensor.shape)] = tensor
        return padded


def _refused(config: PreTrainedConfig, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"A model of type {config.model_type} cannot be padded with heads: {why}")
