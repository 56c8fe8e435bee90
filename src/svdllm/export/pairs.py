"""Writes packed factors as pairs, for tensor parallelism and for tools that want pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from svdllm.checkpoint.finish import RECIPE_FILE, finish_checkpoint
from svdllm.checkpoint.output import new_folder
from svdllm.checkpoint.report import is_checkpoint, read_report
from svdllm.checkpoint.tensors import buffer_names, num_params, tensor_bytes
from svdllm.checkpoint.weight_sizes import weight_bytes
from svdllm.common.errors import InputError, NumericalError
from svdllm.common.progress import Reporter
from svdllm.export.copies import config_to_export, logits_of_both, packed_linears, require_intact, write_model
from svdllm.export.rewritten import Rewritten
from svdllm.export.stored_linears import StoredLinears
from svdllm.models.linears import linear_shape
from svdllm.models.logits import compare_logits
from svdllm.models.low_rank.factory import dense_config
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.skeleton import build_skeleton
from svdllm.models.weights import SafetensorsWeights

Forms = dict[str, dict[str, Any]]  # linear -> its entry in config.json


@dataclass(frozen=True, kw_only=True)
class PairsExport:
    """The record of an export: how many packed linears became pairs and dense ones, and bytes of weight files.

    ``difference`` is the largest of a logit, as a share of the largest logit.
    """

    pairs: int
    dense: int
    bytes_before: int
    bytes_after: int
    difference: float


def export_pairs(folder: str | Path, output_dir: str | Path) -> PairsExport:
    """Writes a checkpoint of pairs that computes the same as one with packed linears, and is larger.

    A linear whose pair would be no smaller than its dense matrix becomes dense. Narrower MLPs stay as they are.

    Raises:
        InputError: ``folder`` is not a checkpoint or has no packed linears, or ``output_dir`` is not empty.
        CheckpointError: a file is truncated or altered.
        ResourceError: the disk is too small.
        NumericalError: the pairs compute other logits; nothing is written.
    """
    folder = Path(folder)
    config = config_to_export(folder)
    info = LowRankInfo.of(config)
    packed = packed_linears(info)
    if info is None or not packed:
        raise InputError(f"{folder} has no packed linears, so there is nothing to write as pairs. Use it as it is.")
    with new_folder(output_dir, "an export") as (output, partial):
        require_intact(folder)
        skeleton = build_skeleton(config)
        weights = SafetensorsWeights(folder, skeleton)
        linears = StoredLinears(weights, skeleton, info)
        forms = _unpacked(info, linears, build_skeleton(dense_config(config)))
        fields = _fields(folder, info, forms)
        tensors = Rewritten(weights, linears, build_skeleton(type(config).from_dict(fields)), packed)
        output.require_disk(tensor_bytes(tensors.layout), "the weights need")
        write_model(partial, tensors, tensors.layout, fields, folder, info)
        difference = compare_logits(*logits_of_both(folder, config, partial), _not_the_same)
        if is_checkpoint(folder):
            _finish(folder, partial, num_params(tensors.layout, buffer_names(skeleton)), forms)
        pairs = sum(forms.get(name, {}).get("form") == "pair" for name in packed)
        return PairsExport(
            pairs=pairs,
            dense=len(packed) - pairs,
            bytes_before=weight_bytes(folder).files,
            bytes_after=weight_bytes(partial).files,
            difference=difference,
        )


def _unpacked(info: LowRankInfo, linears: StoredLinears, dense: PreTrainedModel) -> Forms:
    """The forms without packed ones: pairs of the same rank, or dense matrices where these are no larger.

    Linears that share a first factor become pairs or dense together. Where the dense linear has no place for a bias,
    they become pairs.
    """
    forms: Forms = {name: dict(entry) for name, entry in info.forms.items()}
    groups: dict[str, list[str]] = {}
    for name in packed_linears(info):
        groups.setdefault(info.shared_factors.get(name, name), []).append(name)
    for names in groups.values():
        modules = {name: dense.get_submodule(name) for name in names}
        needs_pair = any(linears.bias_name(name) and modules[name].bias is None for name in names)
        shapes = [_shape(modules[name], forms[name]) for name in names]
        rank, in_features, out_features = forms[names[0]]["rank"], shapes[0][1], sum(rows for rows, _ in shapes)
        is_pair = needs_pair or rank * (in_features + out_features) < in_features * out_features
        for name in names:
            sizes = {key: forms[name][key] for key in ("in_features", "out_features") if key in forms[name]}
            if is_pair:
                forms[name] = {"form": "pair", "rank": rank, **sizes}
            elif sizes:
                forms[name] = {"form": "narrow", **sizes}
            else:
                del forms[name]
    return forms


def _shape(dense: nn.Module, entry: Mapping[str, Any]) -> tuple[int, int]:
    """``(out_features, in_features)`` of a linear in its form."""
    rows, columns = linear_shape(dense)
    return entry.get("out_features", rows), entry.get("in_features", columns)


def _fields(folder: Path, info: LowRankInfo, forms: Forms) -> dict[str, Any]:
    """The content of ``config.json`` with other forms."""
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shared = {name: first for name, first in info.shared_factors.items() if "rank" in forms.get(name, {})}
    fields["svdllm"] |= {"forms": forms, "shared_factors": shared}
    if not shared:
        del fields["svdllm"]["shared_factors"]
    return fields


def _not_the_same(how: str) -> NumericalError:
    return NumericalError(f"The pairs do not compute what the packed linears do: {how}. Nothing was written.")


def _finish(folder: Path, partial: Path, params: int, forms: Forms) -> None:
    """Completes the copy of a whole checkpoint, with its recipe and with the report brought up to date."""
    report = read_report(folder)
    rows = [_row(row, forms) for row in report["linears"]]
    kept, dense = sum(row["params"] for row in rows), sum(row["out_features"] * row["in_features"] for row in rows)
    report |= {
        "linears": rows,
        "params": params,
        "file_bytes": weight_bytes(partial).files,
        "achieved_ratio": (dense - kept) / dense,
        "quantized_file_bytes": None,  # predicted for the packed linears, as the speed
        "speed": None,
        "packed_file_bytes": report["file_bytes"],
    }
    recipe = (folder / RECIPE_FILE).read_text(encoding="utf-8")
    finish_checkpoint(partial, recipe, report, torch.device("cpu"), Reporter())


def _row(row: dict[str, Any], forms: Forms) -> dict[str, Any]:
    """The row of a target in the report, once it is a pair or dense: a pair of rank r has r^2 more parameters."""
    if row.get("form") != "packed":
        return row
    if forms.get(row["name"], {}).get("form") == "pair":
        return row | {"form": "pair", "params": row["params"] + row["rank"] ** 2}
    return row | {"form": "dense", "size": None, "rank": None, "params": row["out_features"] * row["in_features"]}
