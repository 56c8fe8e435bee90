"""What the end-to-end tests share: a tiny model on disk, a small text, and a hash of a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from families import tiny_model
from svdllm import CompressionResult, Recipe, compress
from svdllm.compression.forms import rank_of
from svdllm.compression.recipe import PLAIN
from svdllm.compression.recipe_parts import BUDGETS
from svdllm.models.chosen import Chosen, Forms
from svdllm.models.discover import discover
from svdllm.models.skeleton import build_skeleton
from svdllm.models.structure import Target
from svdllm.models.walk import Walk
from svdllm.models.weights import MemoryWeights

TEXT = " ".join(f"the quick brown fox {n} jumps over the lazy dog and {n * 7 % 13} more." for n in range(400))


def save_dense(folder: Path, family: str = "llama", seed: int = 0, tokenizer: Any = None, **overrides: Any) -> Path:
    """A tiny model as users have it: config, safetensors, tokenizer."""
    model = tiny_model(family, seed, vocab_size=300, **overrides)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def token_windows(samples: int = 8, seqlen: int = 16, vocab: int = 128, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (samples, seqlen), generator=generator)


def inputs_in(model: Any, name: str, ids: Tensor) -> Tensor:
    """The tokens that a module of a model is handed, ``in x T``, float64."""
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return found[0].flatten(0, -2).T.double()


def walk_of(model: Any, ids: Tensor, **settings: Any) -> Walk:
    """A walk over a model in memory, in batches of two windows."""
    skeleton = build_skeleton(model.config)
    return Walk(
        weights=MemoryWeights(model, skeleton),
        skeleton=skeleton,
        structure=discover(skeleton),
        ids=ids,
        device=torch.device("cpu"),
        dtype=torch.float32,
        batch_tokens=2 * ids.shape[1],
        **settings,
    )


def small_recipe(**settings: Any) -> Recipe:
    budget = {} if any(settings.get(name) for name in BUDGETS) else {"ratio": 0.3}
    return Recipe(**(PLAIN | {"samples": 8, "seqlen": 16, "seed": 1, **budget} | settings))


def run(
    model: Any, output: Path, *, ids: Tensor | None = None, recipe: Recipe | None = None, **options: Any
) -> CompressionResult:
    """A small run on given tokens."""
    calibration = token_windows() if ids is None else ids
    return compress(model, recipe or small_recipe(), output, calibration=calibration, **options)


def digests(folder: Path, skip: tuple[str, ...] = ("svdllm/report.json",)) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint; the report, which holds times, apart."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in named.items() if name not in skip}


def target(out_features: int, in_features: int, name: str = "linear", group: str | None = None) -> Target:
    """A linear of a made-up model."""
    return Target(
        name=name,
        block=0,
        in_features=in_features,
        out_features=out_features,
        has_bias=False,
        is_conv1d=False,
        group=group or name,
    )


def pairs(ranks: Mapping[str, int]) -> dict[str, Chosen]:
    """Pairs of factors of some ranks."""
    return {name: Chosen("pair", rank) for name, rank in ranks.items()}


def ranks_in(forms: Forms) -> dict[str, int]:
    """Target -> rank, of every target that has one."""
    ranks = {name: rank_of(chosen) for name, chosen in forms.items()}
    return {name: rank for name, rank in ranks.items() if rank is not None}


def pair_params(target: Target, rank: int) -> int:
    """Parameters of a pair of factors."""
    return rank * (target.in_features + target.out_features) + target.added_params
