"""A pruned model before it is written: its tensors, and what its config says about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from svdllm.checkpoint.tensors import Tensors
from svdllm.common.errors import NumericalError
from svdllm.compression.subject import Subject
from svdllm.models.channels import Channels

Biases = Mapping[str, Tensor]  # linear -> what is added to its bias


@dataclass(frozen=True, kw_only=True)
class Made:
    """The tensors of a pruned model, and the entries of its config.

    Args:
        layout: names, shapes and dtypes of the tensors in the files.
        get: name -> tensor, on the CPU.
        entry: entries of ``config.svdllm``.
        fields: entries of the config itself that change.
        removed: number of the targets' weights that are removed.
        details: what the report says about the choice.
    """

    layout: Tensors
    get: Callable[[str], Tensor]
    entry: dict[str, Any]
    fields: dict[str, Any] = field(default_factory=dict)
    removed: int
    details: dict[str, Any]


def narrowed(
    subject: Subject,
    channels: Sequence[Channels],
    groups: Mapping[str, Tensor],
    biases: Biases,
    details: dict[str, Any],
) -> Made:
    """The model with some groups of its channels.

    Args:
        groups: name of channels -> mask of the groups that stay; all stay where there is none.
        biases: of consumers of which something is removed; all of them or none.
    """
    targets = {target.name: target for target in subject.structure.targets}
    fewer = [each for each in channels if each.name in groups and not bool(groups[each.name].all())]
    kept = {name: (each, each.kept(name, groups[each.name])) for each in fewer for name in each.linears}
    forms: dict[str, dict[str, Any]] = {}
    layout: Tensors = {}
    for name, (each, indices) in kept.items():
        side = "in_features" if name == each.consumer else "out_features"
        forms[name] = {"form": "narrow", side: len(indices)}

    def cut(name: str) -> tuple[int, Tensor] | None:
        """The dimension of a tensor of which a part stays, and its indices; None for all other tensors."""
        owner, _, leaf = name.rpartition(".")
        if owner not in kept:
            return None
        each, indices = kept[owner]
        reads = owner == each.consumer
        if leaf == "bias":
            return None if reads else (0, indices)
        return int(reads != targets[owner].is_conv1d), indices

    weights, stored = subject.weights, subject.stored
    for name, (shape, dtype) in stored.items():
        owner, _, leaf = name.rpartition(".")
        place = cut(name)
        shape = shape if place is None else (*shape[: place[0]], len(place[1]), *shape[place[0] + 1 :])
        layout[name] = (shape, dtype)
        if leaf == "weight" and owner in biases and f"{owner}.bias" not in stored:
            layout[f"{owner}.bias"] = (tuple(biases[owner].shape), dtype)

    def get(name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        shape, dtype = layout[name]
        tensor, place = weights.get(name) if name in stored else torch.zeros(shape, dtype=dtype), cut(name)
        if place is not None:
            tensor = tensor.index_select(*place).contiguous()
        if leaf == "bias" and owner in biases:
            tensor = (tensor.double() + biases[owner].cpu()).to(dtype)
            if not bool(torch.isfinite(tensor).all()):
                raise NumericalError(f"{name} overflows {dtype}: the inputs of {owner} are too large for a bias.")
        return tensor

    counts = {name: share * int(groups[each.name].sum()) for each in fewer for name, share in each.counts.items()}
    removed = sum(int((~groups[each.name]).sum()) * each.params_per_group(targets) for each in fewer)
    entry = {"forms": forms} | ({"counts": counts} if counts else {}) | ({"bias_correction": True} if biases else {})
    return Made(layout=layout, get=get, entry=entry, removed=removed, details=details)
