"""Tiny random models in which every form occurs: pairs, linears packed by rows and by columns, narrower MLPs, dense."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

from families import tiny_model
from mixed import model_with
from runs import run, small_recipe
from svdllm.models.discover import discover
from svdllm.models.linears import linear_shape
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


def every_form(dense: Any, widths: tuple[int, ...] = WIDTHS, rank: int = 6) -> dict[str, dict[str, Any]]:
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


def model_of_every_form(
    family: str = "llama", seed: int = 0, rank: int = 6, widths: tuple[int, ...] = WIDTHS, **config: Any
) -> Any:
    """A float32 model in eval mode with random weights, biases and orders."""
    forms = every_form(tiny_model(family, **config), widths, rank)
    return model_with(family, forms, seed, overrides=config)


def save_every_form(folder: Path, family: str = "llama", **settings: Any) -> Path:
    """A model of every form as ``save_pretrained`` writes it."""
    model_of_every_form(family, **settings).save_pretrained(folder)
    return folder


def checkpoint_of_every_form(dense: Path, folder: Path, **settings: Any) -> Path:
    """A checkpoint in which every form occurs, as ``compress`` writes it."""
    return run(dense, folder, recipe=small_recipe(ranks=RANKS, **settings)).output_dir
