"""Makes a mixture with fewer experts of one with more, whatever its family: by what changes shape with their number."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from svdllm.common.errors import UnsupportedModelError
from svdllm.models.experts import Readable, expert_tensors
from svdllm.models.low_rank.lowrank import SplitExperts
from svdllm.models.skeleton import build_skeleton

Kept = Mapping[str, Sequence[int]]  # module of a layer's experts -> the experts that are kept, ascending


def experts_of(skeleton: PreTrainedModel) -> dict[str, SplitExperts]:
    """The modules of split experts by name, one for each layer that has some."""
    return {name: module for name, module in skeleton.named_modules() if isinstance(module, SplitExperts)}


@dataclass(frozen=True)
class KeptTensors:
    """The tensors of a mixture with some experts of each layer of another one, made one at a time.

    Beside the experts' own tensors, those with one entry for each expert lose the entries of the experts that are
    dropped: the router's rows, and biases or scales beside them.

    Args:
        dense: the skeleton of the mixture that ``weights`` belong to.
        skeleton: that of the smaller one.
    """

    dense: PreTrainedModel
    skeleton: PreTrainedModel
    weights: Readable
    kept: Kept

    def get(self, name: str) -> Tensor:
        experts = self._experts_beside(name)
        if name in self._places:
            index, _, leaf = name.removeprefix(f"{experts}.").partition(".")
            return self.weights.get(f"{experts}.{self.kept[experts][int(index)]}.{leaf}")
        tensor = self.weights.get(name)
        if (dim := self._shrunk.get(name)) is None:
            return tensor
        return tensor.index_select(dim, torch.tensor(self.kept[experts], device=tensor.device))

    @cached_property
    def _places(self) -> Mapping[str, Any]:
        return expert_tensors(self.skeleton)

    @cached_property
    def _shrunk(self) -> dict[str, int]:
        return shrunk_dims(self.dense, self.skeleton)

    def _experts_beside(self, name: str) -> str:
        """The module of experts whose name has most in common with that of a tensor."""

        def shared(module: str) -> int:
            pairs = zip(module.split("."), name.split("."), strict=False)
            return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

        return max(self.kept, key=shared)


def with_num_experts(config: PreTrainedConfig, skeleton: PreTrainedModel, count: int) -> PreTrainedConfig:
    """A config of the same mixture with ``count`` experts in every layer.

    The field is found by trying: of the whole numbers in the config that equal the number of experts, the one whose
    change changes the experts of all layers and nothing else but entries for each of them.

    Raises:
        UnsupportedModelError: layers differ in their number of experts, or no field decides it alone.
    """
    found = {module.split_count for module in experts_of(skeleton).values()}
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(skeleton).__name__} has layers of {', '.join(map(str, sorted(found))) or 'no'} experts that can be "
            "told apart; one number of experts in all layers expected."
        )
    _require_free_routing(config, skeleton)
    text_config = config.get_text_config()
    problems = []
    for name in sorted(field.name for field in fields(text_config)):  # type: ignore[arg-type]
        if getattr(text_config, name, None) != next(iter(found)) or isinstance(getattr(text_config, name), bool):
            continue
        smaller = copy.deepcopy(config)
        setattr(smaller.get_text_config(), name, count)
        try:
            made = build_skeleton(smaller)
            if {module.split_count for module in experts_of(made).values()} == {count}:
                shrunk_dims(skeleton, made)
                return smaller
        except UnsupportedModelError as error:
            problems.append(str(error))
    raise UnsupportedModelError(
        f"No field of the config of {type(skeleton).__name__} makes its experts fewer and nothing else"
        f"{': ' + problems[0] if problems else '.'}"
    )


def shrunk_dims(dense: PreTrainedModel, smaller: PreTrainedModel) -> dict[str, int]:
    """Tensor outside the experts -> the dimension that holds one entry for each expert.

    Raises:
        UnsupportedModelError: a tensor differs in another way between the two models.
    """
    counts = [{m.split_count for m in experts_of(model).values()}.pop() for model in (dense, smaller)]
    dims: dict[str, int] = {}
    places, before, after = expert_tensors(dense), dense.state_dict(), smaller.state_dict()
    for name, tensor in after.items():
        if name in places:
            continue
        old, new = tuple(before[name].shape) if name in before else (), tuple(tensor.shape)
        different = [dim for dim, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]]
        if len(old) != len(new) or any([old[dim], new[dim]] != counts for dim in different) or len(different) > 1:
            raise UnsupportedModelError(
                f"{name} of {type(dense).__name__} has the shape {old} for {counts[0]} experts and {new} for "
                f"{counts[1]}: expected one entry for each expert."
            )
        dims |= dict.fromkeys([name] * len(different), different[0] if different else 0)
    return dims


def _require_free_routing(config: PreTrainedConfig, skeleton: PreTrainedModel) -> None:
    """Raises UnsupportedModelError if experts are chosen by more than their rows of the router."""
    groups = getattr(config.get_text_config(), "n_group", None) or 1
    if groups > 1:
        raise UnsupportedModelError(
            f"{type(skeleton).__name__} routes tokens to {groups} groups of experts (n_group) before it chooses some: "
            "without some of them, the others would be in other groups."
        )
    tables = [
        name
        for name, tensor in skeleton.state_dict().items()
        if not tensor.is_floating_point() and any(name.startswith(e.rpartition(".")[0]) for e in experts_of(skeleton))
    ]
    if tables:
        raise UnsupportedModelError(
            f"{type(skeleton).__name__} has whole numbers beside its experts ({tables[0]}), which may name experts."
        )
