"""The shapes of a run, from which its memory, disk and time are counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from svdllm.checkpoint.tensors import Tensors, tensor_bytes
from svdllm.compression.forms import FORMS, most_rank
from svdllm.compression.math.metrics import METHODS, Method
from svdllm.compression.parts import parts_of
from svdllm.compression.probe import probe_sizes, probe_tokens
from svdllm.compression.recipe import Recipe
from svdllm.compression.subject import Subject
from svdllm.models.linears import linear_shape, linears_of
from svdllm.models.structure import Structure, Target


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A run's shapes. Bytes of weights are those in the compute dtype, unless said otherwise."""

    subject: Subject
    recipe: Recipe
    device: torch.device
    dtype: torch.dtype  # in which blocks compute
    written: Tensors  # what one checkpoint holds, at most
    num_outputs: int  # checkpoints that the run writes

    @property
    def structure(self) -> Structure:
        return self.subject.structure

    @property
    def skeleton(self) -> PreTrainedModel:
        return self.subject.skeleton

    @property
    def stored(self) -> Tensors:
        return self.subject.stored

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def method(self) -> Method:
        return METHODS[self.recipe.method]

    @property
    def takes_grams(self) -> bool:
        return self.method.collects_gram

    @cached_property
    def group_widths(self) -> dict[str, int]:
        """Features of every distinct input that targets read."""
        return {target.group: target.in_features for target in self.structure.targets}

    @cached_property
    def parts(self) -> list[list[Target]]:
        """The targets whose statistics are in memory together, of all blocks."""
        depths = {target.name: self.depth(target) for target in self.structure.targets}
        blocks: list[list[Target]] = [[] for _ in self.structure.blocks]
        for target in self.structure.targets:
            blocks[target.block].append(target)
        return [part.targets for targets in blocks for part in parts_of(targets, depths)]

    def token_share(self, target: Target) -> float:
        """Share of the tokens that a target is handed: of an expert, if all are routed to alike."""
        if target.pool is None:
            return 1.0
        experts: Any = self.skeleton.get_submodule(target.pool.rpartition(".")[0])
        return experts.top_k / experts.split_count

    @cached_property
    def linear_shapes(self) -> set[tuple[int, int]]:
        """Distinct (out, in) of all linears of the model."""
        return {linear_shape(module) for _, module in linears_of(self.skeleton)}

    # weights

    @cached_property
    def outside_bytes(self) -> int:
        """Everything outside the blocks that a text runs through: embeddings, head, last norm."""
        idle = tuple(f"{name}." for name in self.structure.idle)
        return self._numel(lambda name: not name.startswith((*self._insides, *idle))) * self.dtype.itemsize

    @cached_property
    def block_bytes(self) -> int:
        """The largest block."""
        sizes = (self._numel(lambda name, inside=inside: name.startswith(inside)) for inside in self._insides)
        return max(sizes) * self.dtype.itemsize

    @cached_property
    def largest_tensor_bytes(self) -> int:
        """As stored."""
        return max(tensor_bytes(self.stored, [name]) for name in self.stored)

    @cached_property
    def gguf_bytes(self) -> int:
        """The GGUF file that is dequantised first; 0 for other models."""
        gguf = self.subject.source.gguf
        return 0 if gguf is None else gguf.stat().st_size

    @property
    def num_stored_weights(self) -> int:
        return self._numel(lambda name: True)

    @property
    def hidden_size(self) -> int:
        return int(self.skeleton.get_input_embeddings().weight.shape[-1])  # type: ignore[union-attr, index]

    @property
    def vocab_size(self) -> int:
        return int(self.skeleton.get_input_embeddings().weight.shape[0])  # type: ignore[union-attr, index]

    # tokens

    @property
    def tokens(self) -> int:
        """Tokens of the calibration text; 0 for a method that runs none of it."""
        return self.recipe.samples * self.recipe.seqlen if self.method.needs_tokens else 0

    @property
    def gradient_tokens(self) -> int:
        recipe = self.recipe
        return min(recipe.gradient_samples, recipe.samples) * recipe.seqlen if recipe.needs_gradients else 0

    @property
    def sequential_tokens(self) -> int:
        recipe = self.recipe
        is_sequential = recipe.calibration_mode == "sequential"
        return min(recipe.sequential_samples, recipe.samples) * recipe.seqlen if is_sequential else 0

    @cached_property
    def probe_tokens(self) -> int:
        return probe_tokens(self.recipe, self.structure, self.skeleton) if self.recipe.needs_probes else 0

    @cached_property
    def num_probes(self) -> dict[str, int]:
        """Sizes that every target and MLP is probed at."""
        return {name: len(sizes) for name, sizes in probe_sizes(self.recipe, self.structure).items()}

    def depth(self, target: Target) -> int:
        """Directions of a target's spectrum that the analysis keeps."""
        return max(target.break_even_rank, most_rank(target, self.recipe.analysed_forms))

    def narrowed_width(self, target: Target) -> int:
        """Inner features of the MLP that a target reads, if it may be narrowed; else 0."""
        inner = target.inner
        narrows = any(FORMS[name].of_mlps for name in self.recipe.analysed_forms)
        return inner.width if narrows and inner is not None and inner.side == "in" else 0

    @property
    def batch_tokens(self) -> int:
        return min(self.tokens, max(self.recipe.batch_tokens, self.recipe.seqlen))

    @property
    def token_bytes(self) -> int:
        """Bytes that one token carries from block to block."""
        return (self.hidden_size + self.structure.shared_features) * self.dtype.itemsize

    @property
    def hidden_states_bytes(self) -> int:
        """Bytes of the hidden states of all calibration tokens, between two blocks."""
        carried = max(self.tokens, 2 * self.sequential_tokens) if self.method.needs_tokens else 0
        return carried * self.token_bytes

    @cached_property
    def _insides(self) -> tuple[str, ...]:
        return tuple(f"{block}." for block in self.structure.blocks)

    def _numel(self, wanted: Callable[[str], bool]) -> int:
        """Stored numbers in the tensors with wanted names."""
        return sum(torch.Size(shape).numel() for name, (shape, _) in self.stored.items() if wanted(name))
