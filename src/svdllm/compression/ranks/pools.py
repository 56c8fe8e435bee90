"""The experts of a layer in an allocation: one form and size for all of them, or one for each.

As one, they are a linear (or an MLP) whose costs and errors are those of all experts together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from svdllm.compression.math.linalg import tail_energies
from svdllm.compression.ranks.question import Evidence, Question
from svdllm.models.chosen import Chosen, Forms
from svdllm.models.structure import Structure, Target


@dataclass(frozen=True)
class Pools:
    """Pool -> its targets, and pool -> its MLPs, of the experts all of whose linears are free."""

    targets: Mapping[str, Sequence[Target]]
    mlps: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, free: Iterable[Target], structure: Structure) -> Pools:
        free = list(free)
        names = {target.name for target in free}
        fixed = {target.expert for target in structure.targets if target.name not in names}
        targets: dict[str, list[Target]] = {}
        mlps: dict[str, dict[str, None]] = {}
        for target in free:
            if target.pool is not None and target.expert not in fixed:
                targets.setdefault(target.pool, []).append(target)
                if target.inner is not None:
                    mlps.setdefault(target.inner.unit, {})[target.inner.mlp] = None
        return cls(targets, {name: list(members) for name, members in mlps.items()})

    def asked(self, question: Question) -> Question:
        """The question with one target for each pool, named as the pool."""
        pool_of = {member.name: name for name, members in self.targets.items() for member in members}
        single = {name: _representative(name, members[0]) for name, members in self.targets.items()}
        largest = {name: max(members, key=lambda member: len(member.name)) for name, members in self.targets.items()}
        cost_of_one = question.unit.cost

        def cost(target: Target, chosen: Chosen | None) -> int:
            members = self.targets.get(target.name)
            return (
                cost_of_one(target, chosen)
                if members is None
                else len(members) * cost_of_one(largest[target.name], chosen)
            )

        def pooled(targets: Sequence[Target]) -> list[Target]:
            found = (single[pool_of[t.name]] if t.name in pool_of else t for t in targets)
            return list({target.name: target for target in found}.values())

        in_pools = {name: pool for pool, names in self.mlps.items() for name in names}
        return replace(
            question,
            targets=pooled(question.targets),
            unit=replace(question.unit, cost=cost),
            mlps={in_pools.get(name, name): pooled(members) for name, members in question.mlps.items()},
        )

    def known(self, evidence: Evidence) -> Evidence:
        """The evidence with the spectra and errors of each pool, summed over its members."""
        energies = {
            name: _sum(evidence.energies[member.name] for member in members)
            for name, members in self.targets.items()
            if members[0].name in evidence.energies
        }
        narrowings = {
            name: _sum(evidence.narrowings[member] for member in members)
            for name, members in self.mlps.items()
            if members[0] in evidence.narrowings
        }
        return replace(
            evidence,
            energies={**evidence.energies, **energies},
            narrowings={**evidence.narrowings, **narrowings},
        )

    def of_members(self, forms: Forms) -> dict[str, Chosen]:
        """The forms of all targets: those of a pool for each of its members."""
        return {
            name: chosen
            for unit, chosen in forms.items()
            for name in ([member.name for member in self.targets[unit]] if unit in self.targets else [unit])
        }


def probed_members(evidence: Evidence, structure: Structure) -> Evidence:
    """The evidence with a probe of each expert: its share of the probe of its pool, by the errors at that size."""
    tails: dict[str, Tensor] = dict(evidence.narrowings)
    probes = dict(evidence.probes)
    for pool, members in structure.pools.items():
        if pool not in evidence.probes:
            continue
        own = [tails[m] if m in tails else tail_energies(evidence.energies[m]) for m in members]
        for size, measured in evidence.probes[pool].items():
            errors = torch.stack([tail[size] for tail in own])
            shares = errors / errors.sum().clamp_min(torch.finfo(errors.dtype).tiny)
            for member, share in zip(members, shares.tolist(), strict=True):
                probes[member] = {**probes.get(member, {}), size: measured * share}
    return replace(evidence, probes=probes)


def _representative(pool: str, member: Target) -> Target:
    inner = None if member.inner is None else replace(member.inner, mlp=member.inner.unit)
    return replace(member, name=pool, group=pool, inner=inner)


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)
