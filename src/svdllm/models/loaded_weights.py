"""A module's weights, in memory for as long as they are needed."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor, nn

from svdllm.models.weights import Weights


@contextmanager
def resident(
    module: nn.Module,
    prefix: str,
    weights: Weights,
    device: torch.device,
    dtype: torch.dtype,
    skip: tuple[str, ...] = (),
):
    """A module on the meta device has its weights while the context lasts (floating ones cast to ``dtype``)."""
    stored = set(weights.names())
    places = []
    for owner, child in module.named_modules(prefix=prefix):
        for leaf, tensor in [*child._parameters.items(), *child._buffers.items()]:
            name = f"{owner}.{leaf}" if owner else leaf
            if tensor is not None and not name.startswith(skip or ("\0",)):
                places.append((child, leaf, tensor, name))
    try:
        for child, leaf, tensor, name in places:
            if name in stored:
                value = weights.get(name)
                value = value.to(device, dtype) if value.is_floating_point() else value.to(device)
                _put(child, leaf, value)
            elif not tensor.is_meta:
                _put(child, leaf, tensor.to(device))
        yield module
    finally:
        for child, leaf, tensor, _ in places:
            if leaf in child._parameters:
                child._parameters[leaf] = tensor
            else:
                child._buffers[leaf] = tensor


def _put(module: nn.Module, leaf: str, value: Tensor) -> None:
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value
