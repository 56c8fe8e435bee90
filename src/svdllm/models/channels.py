"""Channels of a block that can be removed in groups: the heads of an attention, the inner features of an MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from svdllm.models.mlps import rows_by_feature
from svdllm.models.structure import Mlp, Structure, Target

SHARED = -1  # the group of rows that every group reads, or none, and that stay


@dataclass(frozen=True, kw_only=True)
class Channels:
    """Linears whose outputs, group by group, make the input of one linear, so that groups can be removed.

    Args:
        name: names of its linears, without repeating the module that they are in.
        block: index of the block that it is in.
        are_heads: whether a group is a head of keys and values with the query heads that read it; else it is one inner
            feature of an MLP.
        producers: target -> the group of each of its rows; ``SHARED`` for rows that belong to none.
        consumer: the target that reads the channels.
        columns: the group of each column of the consumer.
        counts: integer of a module, by its full name -> its share for each group: numbers of heads and widths that the
            module computes with, and that change with the number of groups.
    """

    name: str
    block: int
    are_heads: bool
    producers: Mapping[str, Tensor] = field(hash=False)
    consumer: str
    columns: Tensor = field(hash=False)
    counts: Mapping[str, int] = field(default_factory=dict, hash=False)

    @cached_property
    def num_groups(self) -> int:
        return int(self.columns.max()) + 1

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.producers, self.consumer)

    def kept(self, linear: str, groups: Tensor) -> Tensor:
        """The rows of a producer, or the columns of the consumer, that stay with some groups (a mask), ascending."""
        owners = self.columns if linear == self.consumer else self.producers[linear]
        return (groups[owners.clamp_min(0)] | (owners == SHARED)).nonzero().flatten()

    def params_per_group(self, targets: Mapping[str, Target]) -> int:
        """Number of weights that go with a group."""
        rows = sum(int((owners == 0).sum()) * targets[name].in_features for name, owners in self.producers.items())
        return rows + int((self.columns == 0).sum()) * targets[self.consumer].out_features

    def sums(self, linear: str, values: Tensor) -> Tensor:
        """Adds up a value of every row of a producer, or every column of the consumer, by group."""
        owners = (self.columns if linear == self.consumer else self.producers[linear]).to(values.device)
        own = owners != SHARED
        return values.new_zeros(self.num_groups).index_add_(0, owners[own], values[own])


def channels_of_mlps(structure: Structure) -> tuple[Channels, ...]:
    """The inner features of all MLPs of a structure, those of experts apart: every feature is a group."""
    outs = {target.name: target.out_features for target in structure.targets}
    return tuple(_channels_of(mlp, outs) for mlp in structure.mlps if mlp.pool is None)


def _channels_of(mlp: Mlp, out_features: Mapping[str, int]) -> Channels:
    features = torch.arange(mlp.width)

    def owners(rows: int) -> Tensor:
        groups = torch.empty(rows, dtype=torch.long)
        groups[rows_by_feature(rows, mlp.width, mlp.interleaved)] = features[:, None]
        return groups

    return Channels(
        name=mlp.name,
        block=mlp.block,
        are_heads=False,
        producers={name: owners(out_features[name]) for name in mlp.producers},
        consumer=mlp.consumer,
        columns=features,
    )
