"""Tiny random models with all forms of linears: pairs, packed ones, narrower MLPs, dense ones."""

from __future__ import annotations

from itertools import cycle, islice
from typing import Any

import torch

from families import linear_targets, tiny_model
from svdllm.models.low_rank import FORMAT_VERSION, PackedLinear, family_classes, low_rank_config

PAIR = {"form": "pair", "rank": 6}
ROWS = {"form": "packed", "rank": 7, "side": "rows"}
COLUMNS = {"form": "packed", "rank": 5, "side": "columns"}
DENSE = None
MIXED = (ROWS, COLUMNS, PAIR, DENSE, ROWS)  # five, so that they fall on other linears in every block
WIDTH = 40  # of a narrower MLP, of 48


def narrower(names: list[str], width: int = WIDTH) -> dict[str, dict[str, Any]]:
    """The forms of a narrower MLP, by the names of a Llama's linears."""
    sizes = {"gate_proj": "out_features", "up_proj": "out_features", "down_proj": "in_features"}
    found = {name: sizes[leaf] for name in names if (leaf := name.rpartition(".")[2]) in sizes}
    return {name: {"form": "narrow", size: width} for name, size in found.items()}


def model_with(family: str, forms: dict[str, dict[str, Any]], seed: int = 0, **settings: Any) -> Any:
    """A model with these forms, of random weights, biases and orders, in eval mode."""
    base = tiny_model(family, seed, **settings.pop("overrides", {}))
    entry = {"format_version": FORMAT_VERSION, "base_model_type": family, "forms": forms, **settings}
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family_classes(family).causal_lm(low_rank_config(base.config, entry)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.order.copy_(torch.randperm(len(module.order), generator=generator))
        for name, parameter in model.named_parameters():
            is_new = ".svd_" in name or not bool(parameter.any())  # as the weight of a narrower linear
            scale = 0.3 if parameter.ndim == 1 else 0.2 * is_new
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def mixed_model(family: str, seed: int = 0, forms: Any = MIXED, **settings: Any) -> Any:
    """A model whose linears have ``forms`` by turns, in the order of ``named_modules``."""
    names = list(linear_targets(tiny_model(family, **settings.get("overrides", {}))))
    turns = zip(names, islice(cycle(forms), len(names)), strict=True)
    return model_with(family, {name: dict(form) for name, form in turns if form}, seed, **settings)
