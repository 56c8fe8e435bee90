"""The model that a run compresses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from svdllm.checkpoint.tensors import Tensors, buffer_names, stored_tensors
from svdllm.common.device import resolve_device, resolve_dtype
from svdllm.common.errors import InputError, UnsupportedModelError
from svdllm.common.processes import ALONE, Processes
from svdllm.common.run_options import RunOptions
from svdllm.compression.forms import FORMS, factors_of, in_bits
from svdllm.compression.recipe import Recipe
from svdllm.compression.recipe_forms import IN_SOURCE_DTYPE
from svdllm.compression.rounded_sources import require_unrounded
from svdllm.models.batches import Batches, windows_per_batch
from svdllm.models.discover import discover
from svdllm.models.experts import ExpertTensor, expert_tensors
from svdllm.models.hub import hub_folder
from svdllm.models.joint_keys_and_values import with_joint_keys_and_values
from svdllm.models.left_dense import TOO_SMALL
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.open import Source
from svdllm.models.skeleton import build_skeleton
from svdllm.models.structure import Structure, bias_corrected, left_dense
from svdllm.models.vocabulary import vocabulary_targets
from svdllm.models.walk import Walk
from svdllm.models.weights import SafetensorsWeights, Weights
from svdllm.models.wrapped import require_part

LEAST_SHARE = 0.5  # of the blocks' parameters


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to compress: where its weights are, its skeleton, and its blocks and targets."""

    source: Source
    skeleton: PreTrainedModel
    structure: Structure

    @property
    def weights(self) -> Weights:
        """The weights. Only ``read_weights`` gives them to a subject whose config alone was opened."""
        assert self.source.weights is not None
        return self.source.weights

    @cached_property
    def stored(self) -> Tensors:
        """The tensors in the source's files, or those to be expected in them while only the config is known."""
        return stored_tensors(self.source, self.skeleton)

    @cached_property
    def expert_tensors(self) -> dict[str, ExpertTensor]:
        """The tensors of single experts, which transformers stacks."""
        return expert_tensors(self.skeleton)

    @cached_property
    def buffers(self) -> set[str]:
        """Names of the tensors that are not parameters."""
        return buffer_names(self.skeleton)

    def placement(self, recipe: Recipe) -> tuple[torch.device, torch.dtype]:
        """The device on which the blocks run, and the dtype in which they compute."""
        device = resolve_device(recipe.device)
        return device, resolve_dtype(recipe.dtype, device, self.source.dtype)

    def walk(
        self,
        ids: Tensor,
        recipe: Recipe,
        spill_file: Path | None = None,
        scratch: Path | None = None,
        processes: Processes | None = None,
    ) -> Walk:
        """A walk that carries token ids (``windows x seqlen``) through the dense model.

        Args:
            spill_file: holds the hidden states; without it they stay in RAM.
            scratch: the folder of the weights of experts; without it they stay in RAM.
            processes: share the tokens; without them, this process carries all.
        """
        device, dtype = self.placement(recipe)
        dealt = None
        if processes is not None:
            dealt = Batches.dealt(len(ids), windows_per_batch(recipe.batch_tokens, ids.shape[1]), processes)
            ids = ids[dealt.windows]
        return Walk(
            weights=self.weights,
            skeleton=build_skeleton(self.source.config, dtype),
            structure=self.structure,
            ids=ids,
            device=device,
            dtype=dtype,
            batch_tokens=recipe.batch_tokens,
            spill_file=spill_file,
            scratch=scratch,
            processes=processes or ALONE,
            dealt=dealt,
        )


def discover_subject(source: Source, recipe: Recipe) -> Subject:
    """Finds the blocks and targets of a model from its config.

    Raises:
        InputError: the model is compressed already, or a pattern of the recipe matches nothing.
        UnsupportedModelError: the structure of the model is not understood.
    """
    if info := LowRankInfo.of(source.config, source.name):
        named = f" ({info.source['id']})" if "id" in info.source else ""
        raise InputError(f"{source.name} is compressed already; compress its dense source{named}.")
    if any(in_bits(FORMS[name]) for name in recipe.analysed_forms):
        require_unrounded(source, IN_SOURCE_DTYPE)
    skeleton = build_skeleton(source.config)
    return Subject(source=source, skeleton=skeleton, structure=structure_for(skeleton, recipe))


def structure_for(skeleton: PreTrainedModel, recipe: Recipe) -> Structure:
    """Finds the blocks and targets of a skeleton, with the joint and bias-corrected targets that the recipe asks for.

    Raises:
        InputError, UnsupportedModelError: as ``discover_subject``.
    """
    require_part(skeleton, recipe.part)
    structure = discover(skeleton, recipe.ignore)
    if recipe.joint_kv:
        structure = with_joint_keys_and_values(structure)
    if recipe.bias_correction:
        structure = bias_corrected(structure)
    if recipe.stores_vocabulary:
        outside = vocabulary_targets(skeleton)
        kept = tuple(t for t in outside if not any(map(t.matched_by, recipe.ignore)))
        structure = replace(structure, vocabulary=kept)
    # Where the user has named what becomes of each, none is left dense.
    if recipe.ranks is None and (small := _too_small(structure, recipe)):
        structure = left_dense(structure, dict.fromkeys(small, TOO_SMALL))
    _require_most_of(structure, recipe, type(skeleton).__name__)
    return structure


def _too_small(structure: Structure, recipe: Recipe) -> list[str]:
    """Names of the targets whose factors save less than half at rank 1, or nothing at any multiple of ``round_to``.

    None, if that is true of all: no budget can be met then, which says what to do.
    """
    forms, targets = recipe.used_forms, structure.targets
    if all(FORMS[name].exact_rank is None for name in forms):
        return []
    small = [
        target.name
        for target in targets
        if 2 * (target.in_features + target.out_features) > target.num_weights
        or not factors_of(target, forms).sizes(target, recipe.round_to)
    ]
    return small if len(small) < len(targets) else []


def _require_most_of(structure: Structure, recipe: Recipe, model: str) -> None:
    """Raises UnsupportedModelError if less than half of the blocks' weights can be compressed, unless allowed."""
    share = structure.compressible_share
    if share < LEAST_SHARE and not recipe.allow_partial:
        parts = "; ".join(part.text for part in structure.dense_parts[:3])
        raise UnsupportedModelError(
            f"Only {share:.1%} of the {structure.num_block_params:,} parameters in the blocks of {model} are linears "
            f"that can be compressed, at least {LEAST_SHARE:.0%} expected. The largest of the rest: {parts}. Pass "
            "--allow-partial to compress these linears alone."
        )


def read_weights(subject: Subject, model: Any, options: RunOptions, gguf_folder: Path) -> Subject:
    """Fetches or dequantises the weights of a subject of which only the config was opened.

    Args:
        model: the hub id, where the source is a model on the hub.
        gguf_folder: receives the dequantised weights of a GGUF file.

    Raises:
        InputError: the weights are missing or damaged.
        UnsupportedModelError: the weights are in a form that cannot be read.
    """
    source = subject.source
    if source.gguf is not None:
        from svdllm.models.gguf import convert_gguf

        convert_gguf(source.gguf, source.config, gguf_folder)
        weights = SafetensorsWeights(gguf_folder, subject.skeleton)
        return replace(subject, source=replace(source, folder=gguf_folder, weights=weights))
    folder = hub_folder(str(model), source.revision or options.revision, options.offline, weights=True)
    weights = SafetensorsWeights(folder, subject.skeleton)
    return replace(subject, source=replace(source, folder=folder, weights=weights, unused=weights.unused))
