"""Puts tensors into a module for a while: its own weights, read from their files, or any others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor, nn

from svdllm.models.weights import Weights

NO_TIES: Mapping[str, Sequence[str]] = MappingProxyType({})


@contextmanager
def tensors_replaced(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Puts other tensors in the place of the named parameters and buffers while the context lasts."""
    places = [(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], name) for name in tensors]
    held = [_slots(owner, leaf)[leaf] for owner, leaf, _ in places]
    try:
        for owner, leaf, name in places:
            value = tensors[name]
            if leaf in owner._parameters and not isinstance(value, nn.Parameter):
                value = nn.Parameter(value, requires_grad=False)
            _slots(owner, leaf)[leaf] = value
        yield
    finally:
        for (owner, leaf, _), tensor in zip(places, held, strict=True):
            _slots(owner, leaf)[leaf] = tensor


@contextmanager
def weights_loaded(
    module: nn.Module,
    prefix: str,
    weights: Weights,
    device: torch.device,
    dtype: torch.dtype,
    skip: tuple[str, ...] = (),
    ties: Mapping[str, Sequence[str]] = NO_TIES,
    place: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> Iterator[None]:
    """Gives a module on the meta device its weights while the context lasts; floating ones are cast to ``dtype``.

    Args:
        prefix: name of the module in the model; "" for the whole model.
        skip: beginnings of names, in the model, of tensors that are left alone.
        ties: name in the model -> other names of the same tensor, which is loaded once.
        place: called with the name in the model and each tensor, puts it where it stays.
    """
    stored = set(weights.names())
    start = f"{prefix}." if prefix else ""
    values: dict[str, Tensor] = {}
    loaded: dict[str, Tensor] = {}
    for name, tensor in _own_tensors(module):
        full = f"{start}{name}"
        if skip and full.startswith(skip):
            continue
        found = next((known for known in (full, *ties.get(full, ())) if known in stored), None)
        if found is None:  # a computed buffer
            values[name] = tensor if tensor.is_meta else tensor.to(device)
            continue
        if found not in loaded:
            value = weights.get(found)
            value = value.to(device, dtype) if value.is_floating_point() else value.to(device)
            loaded[found] = place(full, value)
        values[name] = loaded[found]
    with tensors_replaced(module, values):
        yield


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields every parameter and buffer of each module with its name, tied ones under all of their names."""
    for owner, child in module.named_modules():
        for leaf, tensor in [*child._parameters.items(), *child._buffers.items()]:
            if tensor is not None:
                yield f"{owner}.{leaf}" if owner else leaf, tensor


def _slots(module: nn.Module, leaf: str) -> dict[str, Tensor | None]:
    return module._parameters if leaf in module._parameters else module._buffers  # type: ignore[return-value]
