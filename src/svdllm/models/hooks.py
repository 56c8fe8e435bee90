"""Watches and replaces modules of a model for a while."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from svdllm.common.errors import UnsupportedModelError


def first_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a call, however it was given."""
    return args[0] if args else next(iter(kwargs.values()))


@contextmanager
def input_groups(linears: Sequence[tuple[str, nn.Module]], on_input: Callable[[str, Tensor], None] | None = None):
    """Finds which linears read the same tensor, told by the identity of the tensor, while a block runs.

    Yields ``(groups, release)``: ``groups`` maps each linear to the first linear that read the same tensor. Tensors are
    held until ``release()`` is called, so that identities cannot be reused within one run of the block.
    ``on_input(leader, inputs)`` is called once for each distinct input.
    """
    groups: dict[str, str] = {}
    seen: dict[int, tuple[Tensor, str]] = {}

    def hook_for(name: str):
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = first_argument(args, kwargs)
            _, leader = seen.setdefault(id(inputs), (inputs, name))
            if groups.setdefault(name, leader) != leader:
                raise UnsupportedModelError(
                    f"{name} shared its input with {groups[name]} before and with {leader} now; its inputs cannot be "
                    "grouped. Leave it dense with --ignore."
                )
            if on_input is not None and leader == name:
                on_input(leader, inputs)

        return hook

    handles = [module.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, module in linears]
    try:
        yield groups, seen.clear
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(model: nn.Module, replacements: Mapping[str, nn.Module]):
    """Puts other modules in the place of the named ones while the context lasts."""
    originals = {name: model.get_submodule(name) for name in replacements}
    try:
        for name, module in replacements.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)


@contextmanager
def experts_computed(model: nn.Module, implementation: str):
    """Makes stacked experts compute by another implementation of transformers while the context lasts.

    ``batched_mm`` reads no value and so runs without data; ``eager`` copies no weight.
    """
    config: Any = getattr(model, "config", None) or SimpleNamespace()
    before = getattr(config, "_experts_implementation", None)
    config._experts_implementation = implementation
    try:
        yield
    finally:
        config._experts_implementation = before


def to_device(tree: Any, device: torch.device | str) -> Any:
    """Moves every tensor in nested lists, tuples and dicts."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)
