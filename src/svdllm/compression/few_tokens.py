"""Statistics of experts that few tokens are routed to: a part comes from all experts of the layer.

The statistic of expert ``e`` becomes ``C_e + k C / n``: ``C`` is the sum over the experts, ``n`` the number of their
tokens. These ``k`` tokens of the mean expert are a share ``k / (n_e + k)`` of the whole, which falls with the number
``n_e`` of the expert's own tokens, as the best shrinkage of a covariance does (Ledoit and Wolf, 2004).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from svdllm.common.progress import Reporter
from svdllm.compression.math.statistics import MeanAbsolute
from svdllm.models.structure import Target

# Tokens of the mean expert, as a share of the features.
GROUP_TOKENS = 1 / 8

S = TypeVar("S")
NO_GROUPS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class GroupStatistic:
    """The statistic of an expert with a part of that of its group.

    own: of the expert; None if no token was routed to it.
    group: sum over the group, divided by its number of tokens.
    tokens: number of tokens of the mean expert that are added.
    """

    own: Any
    group: GroupMean
    tokens: float

    @property
    def num_tokens(self) -> int:
        return 0 if self.own is None else self.own.num_tokens

    @property
    def group_share(self) -> float:
        """Share of the group in the tokens."""
        return self.tokens / (self.num_tokens + self.tokens)

    def value(self) -> Tensor:
        part = self.tokens * self.group.value
        total = part if self.own is None else _summed(self.own) + part
        return total / (self.num_tokens + self.tokens) if self.group.is_mean else total

    def mean(self) -> Tensor:
        """The mean input, by weight."""
        return self._sum() / self._weight()

    def centred(self) -> Tensor:
        return self.value() - torch.outer(self._sum(), self._sum()) / self._weight()

    def _sum(self) -> Tensor:
        part = self.tokens * self.group.sum
        return part if self.own is None else self.own.total() + part

    def _weight(self) -> float:
        return (0.0 if self.own is None else self.own.total_weight) + self.tokens * self.group.weight


@dataclass(frozen=True)
class GroupMean:
    """The mean over the tokens of a group: of the statistic, and for a Gram of the weighted inputs and the weights.

    is_mean: the statistic is a mean over the tokens itself, and not a sum.
    """

    value: Tensor
    sum: Tensor
    weight: float
    is_mean: bool


def with_group_statistics(
    targets: Sequence[Target], statistics: Mapping[str, S], groups: Mapping[str, Any] = NO_GROUPS
) -> dict[str, Any]:
    """Adds to the statistic of every expert a part of that of its group; other statistics stay as they are.

    Args:
        statistics: by target. Those of experts without tokens may be missing, and are in the result unless the whole
            group is missing.
        groups: pool -> the statistic of all its members, where some of them are not among the targets.
    """
    pools: dict[str, list[Target]] = {}
    for target in targets:
        if target.pool is not None:
            pools.setdefault(target.pool, []).append(target)
    result: dict[str, Any] = dict(statistics)
    for pool, members in pools.items():
        own_statistics = [statistics[target.name] for target in members if target.name in statistics]
        known = [groups[pool]] if pool in groups else own_statistics
        if known:
            group = _mean(known)
            for target in members:
                own = statistics.get(target.name)
                result[target.name] = GroupStatistic(own, group, group_tokens(len(group.value)))
    return result


def expert_tokens(targets: Sequence[Target], statistics: Mapping[str, Any]) -> dict[str, int]:
    """Expert -> number of its tokens; of statistics that were read from a file it is not known."""
    pooled = {target.expert: statistics.get(target.name) for target in targets}
    return {name: s.num_tokens for name, s in pooled.items() if name is not None and isinstance(s, GroupStatistic)}


@dataclass(frozen=True, kw_only=True)
class ExpertTokens:
    """How many calibration tokens were routed to the experts of a model.

    mostly_from_group: number of experts whose statistics are that of their group for more than half.
    """

    experts: int
    without_tokens: list[str]
    mostly_from_group: int
    least: int
    median: int

    @classmethod
    def of(cls, tokens: Mapping[str, int], targets: Sequence[Target]) -> ExpertTokens | None:
        """Counts experts by their tokens; None if there are none."""
        if not tokens:
            return None
        added = {target.expert: group_tokens(target.in_features) for target in reversed(targets)}
        return cls(
            experts=len(tokens),
            without_tokens=[name for name, count in tokens.items() if count == 0],
            mostly_from_group=sum(count < added.get(name, 0) for name, count in tokens.items()),
            least=min(tokens.values()),
            median=sorted(tokens.values())[len(tokens) // 2],
        )

    def warn(self, reporter: Reporter) -> None:
        """Warns of experts without tokens."""
        if self.without_tokens:
            reporter.warn(
                f"{len(self.without_tokens)} of {self.experts} experts saw no calibration token, for instance "
                f"{self.without_tokens[0]}: they are fitted to the tokens of the other experts of their layer. Use "
                "more --samples, or text of more kinds."
            )


def group_tokens(features: int) -> float:
    """Number of tokens of the mean expert that are added to those of each expert."""
    return GROUP_TOKENS * features


def _mean(statistics: Sequence[Any]) -> GroupMean:
    tokens = sum(statistic.num_tokens for statistic in statistics)
    value = _summed(statistics[0]).clone()
    for statistic in statistics[1:]:
        value += _summed(statistic)
    sums = [statistic.total() for statistic in statistics if hasattr(statistic, "total")]
    weight = sum(getattr(statistic, "total_weight", 0.0) for statistic in statistics)
    total = torch.stack(sums).sum(0) if sums else value.new_zeros(())
    return GroupMean(value / tokens, total / tokens, weight / tokens, _is_mean(statistics[0]))


def _summed(statistic: Any) -> Tensor:
    """The statistic as a sum over its tokens."""
    return statistic.value() * statistic.num_tokens if _is_mean(statistic) else statistic.value()


def _is_mean(statistic: Any) -> bool:
    return isinstance(statistic, MeanAbsolute)
