"""Describes what compression changes in a model: its blocks, and the targets in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from svdllm.models.left_dense import IGNORED, DenseModule, DensePart, dense_parts
from svdllm.models.linears import matches
from svdllm.models.shared_state import Argument, Handed
from svdllm.models.wrapped import OutsidePart


@dataclass(frozen=True)
class Inner:
    """The side of a linear on which the inner features of an MLP lie.

    Args:
        mlp: name of the MLP.
        side: ``out`` of a linear that makes them, ``in`` of the linear that reads them.
        width: number of inner features.
        copies: how many times the side holds them: twice for gate and up projection in one linear.
        interleaved: whether the copies of a feature follow each other, and not all features in one copy each.
        pool: of an expert, the name of all experts of its layer.
    """

    mlp: str
    side: Literal["out", "in"]
    width: int
    copies: int = 1
    interleaved: bool = False
    pool: str | None = None

    @property
    def unit(self) -> str:
        """The MLP, or all experts of its layer."""
        return self.pool or self.mlp


@dataclass(frozen=True, kw_only=True)
class Target:
    """A linear that may be compressed, or several that read the same tensor and will share one first factor.

    Args:
        block: index of the block that it is in.
        is_conv1d: GPT-2's ``Conv1D``, which keeps its weight as (in, out).
        group: name of the first target that reads the same tensor.
        bias_corrected: once factorised, it has a bias that makes its mean output equal the dense one.
        parts: name and out_features of each linear, where there are several; their rows follow each other.
        inner: the side with the inner features of an MLP, if it belongs to one that can be narrowed.
        pool: of a linear of an expert, the name of these linears of all experts of its layer.
        vocabulary: "embedding", or "head" if that has a matrix of its own: outside the blocks, stored in few bits or as
            they are.
    """

    name: str
    block: int
    in_features: int
    out_features: int
    has_bias: bool
    is_conv1d: bool
    group: str
    bias_corrected: bool = False
    parts: tuple[tuple[str, int], ...] = ()
    inner: Inner | None = None
    pool: str | None = None
    vocabulary: Literal["", "embedding", "head"] = ""

    @property
    def expert(self) -> str | None:
        """Name of the expert that it belongs to."""
        return None if self.pool is None else self.name.rpartition(".")[0]

    @property
    def unit(self) -> str:
        """The target, or its pool: what is probed, and chosen for, as one."""
        return self.pool or self.name

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of its linears."""
        return tuple(name for name, _ in self.parts) or (self.name,)

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """Splits a tensor with ``out_features`` rows into the rows of each linear."""
        return dict(zip(self.linears, rows.split([size for _, size in self.parts] or len(rows)), strict=True))

    def stacked(self, weights: Sequence[Tensor]) -> Tensor:
        """Stacks the weights of the linears, as the modules keep them, into one matrix (``out x in``)."""
        rows = [weight.mT if self.is_conv1d else weight for weight in weights]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def matched_by(self, pattern: str) -> bool:
        """Whether a pattern matches the name of one of its linears."""
        return any(matches(pattern, name) for name in self.linears)

    @property
    def num_weights(self) -> int:
        return self.in_features * self.out_features

    @property
    def full_rank(self) -> int:
        return min(self.in_features, self.out_features)

    @property
    def break_even_rank(self) -> int:
        """The largest rank whose factors are smaller than the dense matrix."""
        return (self.num_weights - self.added_params - 1) // (self.in_features + self.out_features)

    @property
    def added_params(self) -> int:
        """Number of parameters that a bias correction adds: a bias, where the dense linear has none."""
        return self.out_features * (self.bias_corrected and not self.has_bias)


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """Linears whose outputs, feature by feature, make the input of one linear: its inner features can be removed.

    Args:
        name: names of its linears, without repeating the module that they are in.
        block: index of the block that it is in.
        producers: names of the targets whose outputs are the inner features. ``out_features`` of each is a multiple of
            ``width``: a fused ``gate_up_proj`` has feature ``j`` in the rows ``j`` and ``j + width``, or in ``2 j`` and
            ``2 j + 1`` if it is interleaved.
        consumer: name of the target that reads the inner features.
        width: number of inner features, the ``in_features`` of the consumer.
        pool: of an expert, the name of all experts of its layer.
    """

    name: str
    block: int
    producers: tuple[str, ...]
    consumer: str
    width: int
    interleaved: bool = False
    pool: str | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of its linears, the consumer last."""
        return (*self.producers, self.consumer)


@dataclass(frozen=True, kw_only=True)
class Structure:
    """The parts of a model that compression works with, in the order of the model.

    Args:
        blocks: names of the decoder blocks.
        targets: the linears that may be compressed.
        dense: the modules with parameters inside the blocks that are not targets.
        num_block_params: parameters inside the blocks, of whatever kind.
        num_outputs: of each block, in a tuple that begins with the hidden states; 0 if it returns these alone.
        batch_dim: the dimension of texts in the hidden states.
        shared_arguments: arguments that are mappings, which blocks write into for later blocks.
        handed: outputs of blocks, beside the hidden states, that later blocks take.
        shared_features: number of values per token in these mappings and outputs.
        mlps: the MLPs whose inner features can be removed.
        outside: the parts of a wrapper outside its language model.
        idle: names of inner models that a text does not run, such as an encoder of images.
        vocabulary: the embedding and an untied head, where they may be stored in few bits.
    """

    blocks: tuple[str, ...]
    targets: tuple[Target, ...]
    num_outputs: tuple[int, ...]
    batch_dim: int = 0
    dense: tuple[DenseModule, ...] = ()
    num_block_params: int = 0
    shared_arguments: tuple[Argument, ...] = ()
    handed: tuple[Handed, ...] = ()
    shared_features: int = 0
    mlps: tuple[Mlp, ...] = ()
    outside: tuple[OutsidePart, ...] = ()
    idle: tuple[str, ...] = ()
    vocabulary: tuple[Target, ...] = ()

    @property
    def stored(self) -> tuple[Target, ...]:
        """Everything that may get another form."""
        return (*self.targets, *self.vocabulary)

    def block_targets(self, block: int) -> list[Target]:
        return [target for target in self.targets if target.block == block]

    @property
    def mlp_targets(self) -> dict[str, list[Target]]:
        """Name of an MLP that can be narrowed -> its targets, the consumer last."""
        by_name = {target.name: target for target in self.targets}
        return {mlp.name: [by_name[name] for name in mlp.linears] for mlp in self.mlps}

    @property
    def pools(self) -> dict[str, list[str]]:
        """Pool -> its targets or MLPs."""
        pools: dict[str, list[str]] = {}
        for member in (*self.targets, *self.mlps):
            if member.pool is not None:
                pools.setdefault(member.pool, []).append(member.name)
        return pools

    @property
    def block_of(self) -> dict[str, int]:
        """Target, MLP or pool -> index of its block; 0 for the vocabulary."""
        members = (*self.stored, *self.mlps)
        return {name: member.block for member in members for name in (member.name, member.pool or member.name)}

    @property
    def num_target_params(self) -> int:
        """Number of weights of the targets, without biases: the whole that ``ratio`` is a share of."""
        return sum(target.num_weights for target in self.targets)

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names of the linears that ``--ignore`` leaves alone."""
        return tuple(module.name for module in self.dense if module.reason == IGNORED)

    @property
    def dense_parts(self) -> list[DensePart]:
        """What stays as it is inside the blocks, by class and reason."""
        return dense_parts(self.dense, self.num_block_params)

    @property
    def compressible_share(self) -> float:
        """Share of the blocks' parameters that are weights of linears that can be compressed, ignored ones included."""
        ignored = sum(module.params for module in self.dense if module.reason == IGNORED)
        return (self.num_target_params + ignored) / max(self.num_block_params, 1)


def with_mlps(structure: Structure, mlps: Sequence[Mlp]) -> Structure:
    """Puts MLPs that can be narrowed into a structure, and tells their targets on which side the inner features lie."""
    sides: dict[str, Inner] = {}
    outs = {target.name: target.out_features for target in structure.targets}
    for mlp in mlps:
        sides |= {
            name: Inner(mlp.name, "out", mlp.width, outs[name] // mlp.width, mlp.interleaved, mlp.pool)
            for name in mlp.producers
        }
        sides[mlp.consumer] = Inner(mlp.name, "in", mlp.width, pool=mlp.pool)
    targets = tuple(replace(target, inner=sides.get(target.name)) for target in structure.targets)
    return replace(structure, targets=targets, mlps=tuple(mlps))


def left_dense(structure: Structure, reasons: Mapping[str, str]) -> Structure:
    """Takes targets out of a structure, and the MLPs that they belong to.

    Args:
        reasons: target -> why it stays dense.
    """
    left = tuple(
        DenseModule(
            name=name,
            kind="Conv1D" if t.is_conv1d else "Linear",
            reason=reasons[t.name],
            params=rows * (t.in_features + t.has_bias),
        )
        for t in structure.targets
        if t.name in reasons
        for name, rows in (t.parts or ((t.name, t.out_features),))
    )
    kept = [target for target in structure.targets if target.name not in reasons]
    leaders: dict[str, str] = {}
    for target in kept:
        leaders.setdefault(target.group, target.name)
    targets = tuple(replace(target, group=leaders[target.group]) for target in kept)
    mlps = [mlp for mlp in structure.mlps if reasons.keys().isdisjoint(mlp.linears)]
    return with_mlps(replace(structure, targets=targets, dense=(*structure.dense, *left)), mlps)


def weight_of(model: nn.Module, target: Target) -> Tensor:
    """The weight of a target as one matrix (``out x in``), however its modules keep it."""
    weights: list[Any] = [model.get_submodule(name).weight for name in target.linears]
    return target.stacked([weight.detach() for weight in weights])


def weights_by_name(target: Target, weight_OI: Tensor) -> dict[str, Tensor]:
    """The inverse of ``weight_of``: parameter -> its part of a target's weight, laid out as the modules keep it."""
    parts = target.split(weight_OI).items()
    return {f"{name}.weight": (rows.mT if target.is_conv1d else rows).contiguous() for name, rows in parts}


def bias_of(model: nn.Module, target: Target) -> Tensor | None:
    """The bias of a target (``out``), or None."""
    biases: list[Any] = [model.get_submodule(name).bias for name in target.linears]
    return torch.cat([bias.detach() for bias in biases]) if target.has_bias else None


def bias_corrected(structure: Structure) -> Structure:
    """Marks every target for bias correction."""
    targets = tuple(replace(target, bias_corrected=True) for target in structure.targets)
    return replace(structure, targets=targets)
