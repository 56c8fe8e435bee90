"""The shapes of a run, from which its memory, disk and time are counted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import prod

import torch
from transformers import PreTrainedModel

from svdllm.checkpoint.tensors import Tensors, tensor_bytes
from svdllm.compression.forms import FORMS, most_rank
from svdllm.compression.math.metrics import METHODS, Method
from svdllm.compression.parts import parts_of
from svdllm.compression.probe import probe_sizes, probe_tokens
from svdllm.compression.pulled_back import is_pulled_back, stream_width
from svdllm.compression.recipe import Recipe
from svdllm.compression.routed import gram_values_per_token, token_shares, weights_per_token
from svdllm.compression.subject import Subject
from svdllm.models.batches import share_of_largest, windows_per_batch
from svdllm.models.linears import linear_shape, linears_of
from svdllm.models.structure import Structure, Target

IDLE = "<idle>"  # stands for the parts that no text runs through
Kind = tuple[tuple[object, ...] | None, ...]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A run's shapes. Bytes of weights are those in the compute dtype, unless said otherwise."""

    subject: Subject
    recipe: Recipe
    device: torch.device
    dtype: torch.dtype  # in which blocks compute
    written_bytes: int  # the weight files of one checkpoint, at most
    num_outputs: int  # checkpoints that the run writes
    experts_on_disk: bool = False  # the weights of those of the loaded block
    processes: int = 1

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
    def kinds(self) -> list[tuple[Target, int]]:
        """Targets that differ in what counts here, each with the number of targets like it."""
        return [(members[0], len(members)) for members in self._alike.values()]

    @cached_property
    def _alike(self) -> dict[Kind, list[Target]]:
        alike: dict[Kind, list[Target]] = {}
        for target in self.structure.targets:
            alike.setdefault(self._kind(target), []).append(target)
        return alike

    def _kind(self, target: Target) -> Kind:
        """All of a target that memory, disk and time depend on."""
        inner = target.inner
        return (
            (target.out_features, target.in_features, target.is_conv1d, target.has_bias, target.bias_corrected),
            tuple(size for _, size in target.parts),
            None if inner is None else (inner.side, inner.width, inner.copies),
            (self.token_shares[target.pool], target.pool is None, target.name == target.group),
        )

    @cached_property
    def distinct_blocks(self) -> list[list[Target]]:
        """The targets of a block, of each kind of block."""
        blocks: list[list[Target]] = [[] for _ in self.structure.blocks]
        for target in self.structure.targets:
            blocks[target.block].append(target)
        return list({tuple(map(self._kind, targets)): targets for targets in blocks}.values())

    @cached_property
    def parts_of_blocks(self) -> list[list[list[Target]]]:
        """The targets whose statistics are in memory together, by block, of each kind of block."""
        mixture = bool(self.structure.pools)
        pulled = {target.name for target in chain(*self.distinct_blocks) if self.is_pulled_back(target)}
        blocks = [parts_of(targets, self._depths, pulled, mixture=mixture) for targets in self.distinct_blocks]
        return [[part.targets for part in parts] for parts in blocks]

    @property
    def parts(self) -> list[list[Target]]:
        """The same of all blocks."""
        return [part for parts in self.parts_of_blocks for part in parts]

    @cached_property
    def token_shares(self) -> dict[str | None, float]:
        """Pool -> share of the tokens that its linears are handed."""
        return token_shares(self.structure, self.skeleton)

    @cached_property
    def weights_per_token(self) -> float:
        """Weights of the targets that a token is multiplied with."""
        return weights_per_token(self.structure, self.token_shares)

    @cached_property
    def gram_values_per_token(self) -> float:
        """Values in the Grams that a token is added to."""
        return gram_values_per_token(self.structure, self.token_shares)

    @cached_property
    def linear_shapes(self) -> set[tuple[int, int]]:
        """Distinct (out, in) of all linears of the model."""
        return {linear_shape(module) for _, module in linears_of(self.skeleton)}

    # weights

    @property
    def outside_bytes(self) -> int:
        """Everything outside the blocks that a text runs through: embeddings, head, last norm."""
        return self._numbers[""][0] * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """The largest block in memory; of experts that are on disk, only what is in memory with one of them."""
        counts = [self._numbers[block] for block in self.structure.blocks]
        numbers = [rest + (not self.experts_on_disk) * experts for rest, experts in counts]
        return (max(numbers) + self.experts_on_disk * 4 * self._largest_expert) * self.dtype.itemsize

    @property
    def experts_bytes(self) -> list[int]:
        """The experts of each block."""
        return [experts * self.dtype.itemsize for _, experts in self._numbers.values()]

    @cached_property
    def _numbers(self) -> dict[str, tuple[int, int]]:
        """Block -> numbers stored in it, outside and inside experts; others under "", or under IDLE."""
        blocks, places = self.structure.blocks, self.subject.expert_tensors
        idle = tuple(f"{name}." for name in self.structure.idle)
        depth = blocks[0].count(".") + 1
        numbers: dict[str, tuple[int, int]] = dict.fromkeys(["", IDLE, *blocks], (0, 0))
        for name, (shape, _) in self.stored.items():
            block = ".".join(name.split(".", depth)[:depth])
            block = block if block in numbers else IDLE if name.startswith(idle) else ""
            rest, experts = numbers[block]
            count, inside = prod(shape), name in places
            numbers[block] = rest + count * (not inside), experts + count * inside
        return numbers

    @cached_property
    def _largest_expert(self) -> int:
        """Numbers in the expert that has most."""
        experts: dict[str, int] = {}
        for target, _ in self.kinds:
            if target.expert is not None:
                experts[target.expert] = experts.get(target.expert, 0) + target.num_weights
        return max(experts.values(), default=0)

    @cached_property
    def largest_tensor_bytes(self) -> int:
        """As stored."""
        return max(prod(shape) * dtype.itemsize for shape, dtype in self.stored.values())

    @cached_property
    def stored_bytes(self) -> int:
        """All tensors of the source."""
        return tensor_bytes(self.stored)

    @cached_property
    def gguf_bytes(self) -> int:
        """The GGUF file that is dequantised first; 0 for other models."""
        gguf = self.subject.source.gguf
        return 0 if gguf is None else gguf.stat().st_size

    @property
    def num_stored_weights(self) -> int:
        return sum(map(sum, self._numbers.values()))

    @property
    def hidden_size(self) -> int:
        return stream_width(self.skeleton)

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
        return self._depths[target.name]

    @cached_property
    def _depths(self) -> dict[str, int]:
        forms = self.recipe.analysed_forms
        depths = {kind: max(m[0].break_even_rank, most_rank(m[0], forms)) for kind, m in self._alike.items()}
        return {target.name: depths[kind] for kind, members in self._alike.items() for target in members}

    def is_pulled_back(self, target: Target) -> bool:
        """Whether the gradients of a target are added up after its weight."""
        return is_pulled_back(target, self.recipe, self.hidden_size)

    def left_sums(self, target: Target) -> list[int]:
        """Widths of the square sums over the gradients of a target."""
        if self.is_pulled_back(target):
            return [target.in_features] * len(target.linears)
        return [target.out_features]

    def left_values(self, target: Target) -> int:
        """Numbers of these sums."""
        return sum(width**2 for width in self.left_sums(target))

    def basis_width(self, target: Target) -> int:
        """Numbers of every direction that the analysis keeps of a target: outputs, and with a left metric its dual."""
        return target.out_features + (target.full_rank if self.recipe.needs_gradients else 0)

    def narrowed_width(self, target: Target) -> int:
        """Inner features of the MLP that a target reads, if it may be narrowed; else 0."""
        inner = target.inner
        narrows = any(FORMS[name].of_mlps for name in self.recipe.analysed_forms)
        return inner.width if narrows and inner is not None and inner.side == "in" else 0

    @property
    def num_batches(self) -> int:
        return -(-self.recipe.samples // windows_per_batch(self.recipe.batch_tokens, self.recipe.seqlen))

    @property
    def share(self) -> float:
        """The largest share of the batches that a process has."""
        return share_of_largest(self.num_batches, self.processes)

    @property
    def batch_tokens(self) -> int:
        return min(self.tokens, max(self.recipe.batch_tokens, self.recipe.seqlen))

    @property
    def token_bytes(self) -> int:
        """Bytes that one token carries from block to block."""
        return (self.hidden_size + self.structure.shared_features) * self.dtype.itemsize

    @property
    def probe_streams_bytes(self) -> int:
        """Bytes of the hidden states of a process's probes and of the dense model, between two blocks."""
        own = -(-sum(self.num_probes.values()) // self.processes) if self.probe_tokens else 0
        return (own + 1) * self.probe_tokens * self.token_bytes

    @property
    def hidden_states_bytes(self) -> int:
        """Bytes of the hidden states of a process's calibration tokens, between two blocks."""
        carried = max(self.tokens, 2 * self.sequential_tokens) if self.method.needs_tokens else 0
        return round(self.share * carried) * self.token_bytes
