"""Drops the experts of a mixture that add least to the hidden states: REAP (arXiv 2510.13999), without training.

The score of an expert is the mean, over the tokens that are routed to it, of the norm of its output times the routing
weight. Every layer loses as many experts, so that the result is an ordinary mixture of its family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdllm.checkpoint.output import new_folder
from svdllm.checkpoint.shards import write_shards
from svdllm.checkpoint.tensors import Tensors, loaded_tensors, tensor_bytes
from svdllm.common.errors import InputError
from svdllm.common.progress import Reporter
from svdllm.common.run_options import RunOptions
from svdllm.compression.inputs import read_windows
from svdllm.compression.recipe import Recipe
from svdllm.compression.subject import Subject, discover_subject
from svdllm.models.companions import copy_companion_files
from svdllm.models.experts import Stacked, expert_tensors, stacked_layout
from svdllm.models.fewer_experts import KeptTensors, experts_of, with_num_experts
from svdllm.models.open import Source, open_config, open_source
from svdllm.models.skeleton import build_skeleton


@dataclass(frozen=True, kw_only=True)
class DroppedExperts:
    """The record of a run.

    kept: module of a layer's experts -> the experts that are kept, by their numbers in the source.
    achieved_ratio: share of the linears' parameters that is gone.
    """

    output_dir: Path
    kept: dict[str, list[int]]
    achieved_ratio: float


def drop_experts(
    model: str | Path,
    recipe: Recipe,
    output_dir: str | Path,
    *,
    offline: bool = False,
    revision: str | None = None,
    reporter: Reporter | None = None,
) -> DroppedExperts:
    """Writes a mixture with so few experts that at least ``ratio`` of the parameters of its linears are gone.

    Args:
        model: hub id or folder.
        recipe: its ratio, and where the calibration text comes from; other settings are not read.
        output_dir: must not exist, or be empty.

    Raises:
        InputError: the model is no mixture, or fewer experts would be left than a token is routed to.
        UnsupportedModelError: its routers need more than their rows for the experts that are kept.
    """
    options = RunOptions.of(offline=offline, revision=revision, reporter=reporter)
    num_kept, _ = _check(open_config(model, offline=offline, revision=revision), recipe)
    with new_folder(output_dir, "a mixture with fewer experts") as (output, partial):
        subject = discover_subject(open_source(model, offline=offline, revision=revision), recipe)
        config = with_num_experts(subject.source.config, subject.skeleton, num_kept)
        with options.reporter.stage("analyze", len(subject.structure.blocks)):
            scores = expert_scores(subject, recipe, options)
        kept = {name: sorted(score_E.topk(num_kept).indices.tolist()) for name, score_E in scores.items()}
        smaller = build_skeleton(config)
        tensors = KeptTensors(subject.skeleton, smaller, subject.weights, kept)
        places, layout = expert_tensors(smaller), _layout(loaded_tensors(smaller, torch.float32), subject)
        output.require_disk(tensor_bytes(layout), "the weights need")
        with options.reporter.stage("write", 1):
            write_shards(partial, Stacked(tensors, places), stacked_layout(layout, places))
        config.save_pretrained(partial)
        if subject.source.folder is not None:
            copy_companion_files(subject.source.folder, partial)
    return DroppedExperts(output_dir=Path(output_dir), kept=kept, achieved_ratio=_share(subject, num_kept))


def check_drop(model: str | Path, recipe: Recipe, *, offline: bool = False, revision: str | None = None) -> float:
    """The share of the linears' parameters that ``drop_experts`` would remove.

    Raises:
        InputError, UnsupportedModelError: as ``drop_experts``.
    """
    num_kept, subject = _check(open_config(model, offline=offline, revision=revision), recipe)
    with_num_experts(subject.source.config, subject.skeleton, num_kept)
    return _share(subject, num_kept)


def expert_scores(subject: Subject, recipe: Recipe, options: RunOptions) -> dict[str, Tensor]:
    """Module of a layer's experts -> ``mean p ||f_e(x)||`` of each expert over its tokens; 0 without a token."""
    tokenizer = subject.source.load_tokenizer(options.offline)
    windows = read_windows(recipe.calibration, tokenizer, recipe, subject.source, options)
    walk = subject.walk(windows.ids, recipe)
    sums: dict[str, Tensor] = {}
    for block in walk.blocks():
        handles = []
        for name, experts in experts_of(walk.skeleton).items():
            if name.startswith(f"{block.name}."):
                sums[name] = torch.zeros(experts.split_count, 2, dtype=torch.float64)
                own = zip(experts.experts, sums[name], strict=True)
                handles += [expert.register_forward_hook(_adding(sum_2)) for expert, sum_2 in own]
        try:
            block.run()
        finally:
            for handle in handles:
                handle.remove()
        options.reporter.advance(block.index + 1, len(subject.structure.blocks))
    walk.close()
    return {name: sum_E2[:, 0] / sum_E2[:, 1].clamp_min(1) for name, sum_E2 in sums.items()}


def _adding(sum_2: Tensor) -> Callable[..., None]:
    """A hook that adds up the norms of an expert's outputs, which the routing weights are in, and their number."""

    def add(module: nn.Module, args: tuple[Any, ...], output_TO: Tensor) -> None:
        norms_T = output_TO.double().norm(dim=-1)
        sum_2.add_(torch.tensor([norms_T.sum().item(), len(norms_T)], dtype=torch.float64))

    return add


def _check(source: Source, recipe: Recipe) -> tuple[int, Subject]:
    """The number of experts that are kept, and the model without its weights."""
    subject = discover_subject(source, recipe)
    modules = list(experts_of(subject.skeleton).values())
    if source.gguf is not None:
        raise InputError(f"{source.name} is a GGUF file, of which no experts are dropped: give its folder or hub id.")
    if not modules:
        raise InputError(f"{source.name} has no experts to drop: expected a mixture of experts.")
    if not isinstance(recipe.ratio, float):
        raise InputError(
            f"Experts are dropped to one ratio, found {recipe.ratio or 'none'}: give one, as in ratio: 0.25."
        )
    count, top_k = modules[0].split_count, max(module.top_k for module in modules)
    num_kept = count - ceil(recipe.ratio / _share_of_one(subject) - 1e-9)
    if num_kept < top_k:
        raise InputError(
            f"Without {recipe.ratio:g} of the linears' parameters, {max(num_kept, 0)} of {count} experts remain, and "
            f"{source.name} routes a token to {top_k}. Ask for a ratio of at most "
            f"{floor(100 * (count - top_k) * _share_of_one(subject)) / 100:.2f}."
        )
    return num_kept, subject


def _share_of_one(subject: Subject) -> float:
    """One expert in every layer, as a share of the linears' parameters."""
    first = [experts.experts[0] for experts in experts_of(subject.skeleton).values()]
    weights = sum(parameter.numel() for expert in first for parameter in expert.parameters() if parameter.ndim == 2)
    return weights / subject.structure.num_target_params


def _share(subject: Subject, num_kept: int) -> float:
    count = next(iter(experts_of(subject.skeleton).values())).split_count
    return (count - num_kept) * _share_of_one(subject)


def _layout(tensors: Tensors, subject: Subject) -> Tensors:
    """The tensors in the dtypes that the source stores them in; experts have those of the first one."""
    return {name: (shape, subject.stored[name][1]) for name, (shape, _) in tensors.items()}
