"""Tiny random models in which every form occurs: pairs, linears packed by rows and by columns, narrower MLPs, dense."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from families import tiny_model
from runs import run
from svdllm.checkpoint.finish import RECIPE_FILE, finish_checkpoint
from svdllm.checkpoint.report import REPORT_FILE
from svdllm.common.progress import Reporter
from svdllm.models.companions import copy_companion_files
from svdllm.models.discover import discover
from svdllm.models.linears import linear_shape
from svdllm.models.low_rank import family_classes, low_rank_config
from svdllm.models.skeleton import build_skeleton

ROUND = ({"form": "packed", "side": "columns"}, {"form": "pair"}, {"form": "packed", "side": "rows"}, {})
WIDTHS = (21, 32)  # of the MLP in each of two blocks


def mixed_forms(model: Any, widths: tuple[int, ...] = WIDTHS, rank: int = 6) -> dict[str, dict[str, Any]]:
    """An entry for most linears of a dense model.

    The MLP of a block is as wide as its number in ``widths``, by turns; in every second block its linears are in their
    turn pairs or packed, too.
    """
    skeleton = build_skeleton(model.config)
    structure = discover(skeleton)
    sizes: dict[str, dict[str, int]] = {}
    for number, mlp in enumerate(structure.mlps):
        width = widths[number % len(widths)]
        for name in mlp.producers:
            rows, _ = linear_shape(skeleton.get_submodule(name))
            sizes[name] = {"out_features": rows // mlp.width * width}
        sizes[mlp.consumer] = {"in_features": width}
    forms, turns = {}, cycle(ROUND)
    for target in structure.targets:
        own = sizes.get(target.name, {})
        entry = {} if own and target.block % 2 == 0 else next(turns)
        if entry:
            forms[target.name] = {**entry, "rank": rank, **own}
        elif own:
            forms[target.name] = {"form": "narrow", **own}
    return forms


def mixed_model(
    family: str = "llama", seed: int = 0, rank: int = 6, widths: tuple[int, ...] = WIDTHS, **config: Any
) -> Any:
    """A float32 model in eval mode with random weights, biases, norms and orders."""
    dense = tiny_model(family, seed, **config)
    entry = {"format_version": 2, "base_model_type": family, "forms": mixed_forms(dense, widths, rank)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family_classes(family).causal_lm(low_rank_config(dense.config, entry))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.3 * parameter.shape[1] ** -0.5)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.1)
            for name, buffer in model.named_buffers():
                if name.endswith(".order"):
                    buffer.copy_(torch.randperm(len(buffer)))
    return model.eval()


def save_mixed(folder: Path, family: str = "llama", tokenizer: Any = None, **settings: Any) -> Path:
    """A mixed model as ``save_pretrained`` writes it."""
    mixed_model(family, **settings).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def mixed_checkpoint(folder: Path, dense: Path, **settings: Any) -> Path:
    """A whole checkpoint of a mixed model: with the recipe and the report of a small run on a dense model's folder."""
    config = AutoConfig.from_pretrained(dense)
    small = run(dense, folder.with_name(f"{folder.name}-pairs")).output_dir
    same = {"vocab_size": config.vocab_size, **settings}
    mixed_model(config.model_type, **same).save_pretrained(folder)
    copy_companion_files(small, folder)
    report = json.loads((small / REPORT_FILE).read_text())
    recipe = (small / RECIPE_FILE).read_text()
    finish_checkpoint(folder, recipe, report, torch.device("cpu"), Reporter())
    return folder
