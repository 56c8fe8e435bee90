"""Tiny random models in which every form occurs: pairs, linears packed by rows and by columns, narrower MLPs, dense."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from families import tiny_model
from runs import run, small_recipe
from svdllm.models.discover import discover
from svdllm.models.linears import linear_shape
from svdllm.models.low_rank import family_classes, low_rank_config
from svdllm.models.skeleton import build_skeleton

TURNS = ({"form": "packed", "side": "columns"}, {"form": "pair"}, {"form": "packed", "side": "rows"}, {})
WIDTHS = (21, 32)  # of the MLPs, by turns
# Explicit forms for ``compress``: packed by columns (q, down) and by rows (v), pairs (k, up), a narrower MLP, dense.
RANKS = {
    r"layers\.0\.mlp": {"narrow": 32},
    "q_proj|down_proj": {"packed": 7},
    "v_proj": {"packed": 5},
    "k_proj|up_proj": {"pair": 6},
}


def mixed_forms(dense: Any, widths: tuple[int, ...] = WIDTHS, rank: int = 6) -> dict[str, dict[str, Any]]:
    """An entry for most linears of a dense model; in odd blocks also for those in the narrower MLP."""
    skeleton = build_skeleton(dense.config)
    structure = discover(skeleton)
    sizes: dict[str, dict[str, int]] = {}
    for mlp, width in zip(structure.mlps, cycle(widths), strict=False):
        rows = {name: linear_shape(skeleton.get_submodule(name))[0] for name in mlp.producers}
        sizes |= {name: {"out_features": rows[name] // mlp.width * width} for name in mlp.producers}
        sizes[mlp.consumer] = {"in_features": width}
    forms, turns = {}, cycle(TURNS)
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
    return random_model(dense, {"forms": mixed_forms(dense, widths, rank)}, seed)


def random_model(dense: Any, settings: dict[str, Any], seed: int = 0) -> Any:
    """A model of the forms in ``settings``, an entry of ``config.json``, with random weights."""
    family = dense.config.model_type
    entry = {"format_version": 2, "base_model_type": family, **settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family_classes(family).causal_lm(low_rank_config(dense.config, entry))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter.shape[1] ** -0.5)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.3)
            for name, buffer in model.named_buffers():
                if name.endswith(".order"):
                    buffer.copy_(torch.randperm(len(buffer)))
    return model.eval()


def save_mixed(folder: Path, family: str = "llama", **settings: Any) -> Path:
    """A mixed model as ``save_pretrained`` writes it."""
    mixed_model(family, **settings).save_pretrained(folder)
    return folder


def mixed_checkpoint(dense: Path, folder: Path, **settings: Any) -> Path:
    """A checkpoint in which every form occurs, as ``compress`` writes it."""
    return run(dense, folder, recipe=small_recipe(ranks=RANKS, **settings)).output_dir
