"""Describes what compression changes in a model: its blocks, and the targets in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from svdllm.common.errors import UnsupportedModelError
from svdllm.models.linears import listing, matches
from svdllm.models.shared_state import Argument


@dataclass(frozen=True, kw_only=True)
class Target:
    """One linear that may be compressed, or several that read the same tensor and are to share their first factor.

    ``group`` is the name of the first target that reads the same tensor.
    """

    name: str
    block: int
    in_features: int
    out_features: int
    has_bias: bool
    is_conv1d: bool  # GPT-2's Conv1D keeps its weight as (in, out)
    group: str
    bias_corrected: bool = False  # factorised, it has a bias that makes its mean output the dense one
    parts: tuple[tuple[str, int], ...] = ()  # of several linears: name and out_features of each, the rows from the top

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the modules."""
        return tuple(name for name, _ in self.parts) or (self.name,)

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """The rows (``out_features`` of them) that belong to each linear."""
        return dict(zip(self.linears, rows.split([size for _, size in self.parts] or len(rows)), strict=True))

    def stacked(self, weights: Sequence[Tensor]) -> Tensor:
        """Weights of the linears as they are kept, one under the other: ``out x in``."""
        rows = [weight.mT if self.is_conv1d else weight for weight in weights]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def matched_by(self, pattern: str) -> bool:
        """Whether the name of a linear of it matches."""
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
        """Of the bias that a correction adds where the dense linear has none."""
        return self.out_features * (self.bias_corrected and not self.has_bias)

    def factor_params(self, rank: int) -> int:
        return rank * (self.in_features + self.out_features) + self.added_params

    def params(self, rank: int | None) -> int:
        """Of the factors of a rank, with the bias that a correction adds, or of the dense matrix (None)."""
        return self.num_weights if rank is None else self.factor_params(rank)


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What a model is made of, as far as compression needs to know."""

    blocks: tuple[str, ...]  # module names, in the order of the model
    targets: tuple[Target, ...]  # not ignored, in the order of the model
    ignored: tuple[str, ...]  # linears inside the blocks that --ignore leaves alone
    returns_tuple: tuple[bool, ...]  # per block: whether the hidden states come first in a tuple
    shared_arguments: tuple[Argument, ...] = ()  # mappings that blocks write into for later ones
    shared_features: int = 0  # values that these hold for a token

    def block_targets(self, block: int) -> list[Target]:
        return [target for target in self.targets if target.block == block]

    @property
    def num_target_params(self) -> int:
        """Weights of the targets, biases apart: what ``ratio`` is a share of."""
        return sum(target.num_weights for target in self.targets)


def with_joint_keys_and_values(structure: Structure) -> Structure:
    """The structure, if ``k_proj`` and ``v_proj`` of every layer are one target, as in multi-head latent attention.

    A linear that is ignored, or that has a bias where the other has none, is left by itself.

    Raises:
        UnsupportedModelError: there is no such pair.
    """
    by_name = {target.name: target for target in structure.targets}
    joint: dict[str, Target] = {}
    for keys in structure.targets:
        parent, _, leaf = keys.name.rpartition(".")
        values = by_name.get(f"{parent}.v_proj")
        if leaf == "k_proj" and values and (values.group, values.has_bias) == (keys.group, keys.has_bias):
            joint[keys.name] = joint[values.name] = _joint(keys, values)
    if not joint:
        raise UnsupportedModelError(
            "No layer has a k_proj and a v_proj that read the same tensor and may both be compressed, so there is nothing "
            f"to give one first factor to; the linears are {listing([target.name for target in structure.targets])}. "
            "Leave out --joint-kv."
        )
    targets = dict.fromkeys(joint.get(target.name, target) for target in structure.targets)
    renamed = {name: target.name for name, target in joint.items()}
    groups = (replace(target, group=renamed.get(target.group, target.group)) for target in targets)
    return replace(structure, targets=tuple(groups))


def _joint(keys: Target, values: Target) -> Target:
    return replace(
        keys,
        name=f"{keys.name}+{values.name.rpartition('.')[2]}",
        out_features=keys.out_features + values.out_features,
        parts=((keys.name, keys.out_features), (values.name, values.out_features)),
    )


def linear_ranks(targets: Sequence[Target], ranks: Mapping[str, int]) -> dict[str, int]:
    """Ranks by linear, of ranks by target."""
    return {name: ranks[target.name] for target in targets if target.name in ranks for name in target.linears}


def shared_factors(targets: Sequence[Target], ranks: Mapping[str, int]) -> dict[str, str]:
    """Factorised linears that have their first factor from another: linear -> that other."""
    factorised = (target.linears for target in targets if target.name in ranks)
    return {name: first for first, *others in factorised for name in others}


def weight_of(model: nn.Module, target: Target) -> Tensor:
    """The weight as ``out x in``, whatever the modules keep; of several linears one under the other."""
    weights: list[Any] = [model.get_submodule(name).weight for name in target.linears]
    return target.stacked([weight.detach() for weight in weights])


def weights_by_name(target: Target, weight_OI: Tensor) -> dict[str, Tensor]:
    """The inverse of ``weight_of``: parameter -> its part of a target's weight, laid out as the modules keep it."""
    parts = target.split(weight_OI).items()
    return {f"{name}.weight": (rows.mT if target.is_conv1d else rows).contiguous() for name, rows in parts}


def bias_of(model: nn.Module, target: Target) -> Tensor | None:
    """The bias of a target, or None."""
    biases: list[Any] = [model.get_submodule(name).bias for name in target.linears]
    return torch.cat([bias.detach() for bias in biases]) if target.has_bias else None


def bias_corrected(structure: Structure) -> Structure:
    """The structure, if the bias of every factorised target is corrected."""
    targets = tuple(replace(target, bias_corrected=True) for target in structure.targets)
    return replace(structure, targets=targets)
