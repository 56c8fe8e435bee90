"""A model with fewer heads and inner features: parts of the tensors of its linears."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from svdllm.checkpoint.tensors import Tensors
from svdllm.common.errors import NumericalError
from svdllm.compression.subject import Subject
from svdllm.models.channels import Channels
from svdllm.pruning.made import Made


class Narrowed:
    """The tensors of a model of which some groups of channels stay.

    Args:
        groups: name of channels -> mask of the groups that stay; all stay where there is none.
        biases: consumer -> what is added to its bias: of all consumers that lose columns, or of none.
    """

    def __init__(
        self,
        subject: Subject,
        channels: Sequence[Channels],
        groups: Mapping[str, Tensor],
        biases: Mapping[str, Tensor] | None = None,
    ):
        self.subject, self.biases, self.groups = subject, biases or {}, groups
        self.targets = {target.name: target for target in subject.structure.targets}
        self.fewer = [each for each in channels if each.name in groups and not bool(groups[each.name].all())]
        self.consumers = {each.consumer for each in self.fewer}
        self.kept = {name: each.kept(name, groups[each.name]) for each in self.fewer for name in each.linears}

    @property
    def layout(self) -> Tensors:
        layout: Tensors = {}
        for name, (shape, dtype) in self.subject.stored.items():
            owner, _, leaf = name.rpartition(".")
            if (part := self._part(name)) is not None:
                dim, indices = part
                shape = (*shape[:dim], len(indices), *shape[dim + 1 :])
            layout[name] = shape, dtype
            if leaf == "weight" and owner in self.biases and f"{owner}.bias" not in self.subject.stored:
                layout[f"{owner}.bias"] = tuple(self.biases[owner].shape), dtype
        return layout

    @property
    def entry(self) -> dict[str, Any]:
        """What the config says."""
        forms = {
            name: {"form": "narrow", "in_features" if name in self.consumers else "out_features": len(indices)}
            for name, indices in self.kept.items()
        }
        counts = {
            name: share * int(self.groups[each.name].sum())
            for each in self.fewer
            for name, share in each.counts.items()
        }
        entry: dict[str, Any] = {"forms": forms}
        return entry | ({"counts": counts} if counts else {}) | ({"bias_correction": True} if self.biases else {})

    def get(self, name: str) -> Tensor:
        """A tensor, in the dtype of the source.

        Raises:
            NumericalError: a bias overflows this dtype; names it.
        """
        owner, _, leaf = name.rpartition(".")
        added = self.biases.get(owner) if leaf == "bias" else None
        if name not in self.subject.stored:
            assert added is not None
            tensor = torch.zeros_like(added, dtype=self.subject.stored[f"{owner}.weight"][1])
        else:
            tensor = self.subject.weights.get(name)
        if (part := self._part(name)) is not None:
            tensor = tensor.index_select(*part).contiguous()
        if added is not None:
            tensor = (tensor.double() + added).to(tensor.dtype)
            if not bool(torch.isfinite(tensor).all()):
                raise NumericalError(
                    f"{name} overflows {tensor.dtype}: the inputs of {owner} are too large for a bias."
                )
        return tensor

    def _part(self, name: str) -> tuple[int, Tensor] | None:
        """The dimension of a tensor of which a part stays, and its indices; None if all of it stays."""
        owner, _, leaf = name.rpartition(".")
        if owner not in self.kept or (leaf == "bias" and owner in self.consumers):
            return None
        by_column = leaf == "weight" and (owner in self.consumers) != self.targets[owner].is_conv1d
        return int(by_column), self.kept[owner]

    def made(self) -> Made:
        """The pruned model; its report has the number of groups that stay, and of all, where some are removed."""
        lost = {each.name: int((~self.groups[each.name]).sum()) for each in self.fewer}
        removed = sum(lost[each.name] * each.params_per_group(self.targets) for each in self.fewer)
        kept = {each.name: [each.num_groups - lost[each.name], each.num_groups] for each in self.fewer}
        return Made(layout=self.layout, tensors=self, entry=self.entry, removed=removed, details={"kept": kept})
