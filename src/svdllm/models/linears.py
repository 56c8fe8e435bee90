"""Finds the decoder blocks of a model and the linears in them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from svdllm.common.errors import InputError, UnsupportedModelError


def is_linear(module: nn.Module) -> bool:
    """Whether a module is an ``nn.Linear``, a subclass with a two-dimensional ``weight``, or GPT-2's ``Conv1D``."""
    return isinstance(module, nn.Linear | Conv1D) and module.weight.ndim == 2


def linears_of(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields every linear in ``module`` with its full name."""
    for name, child in module.named_modules(prefix=prefix):
        if is_linear(child):
            yield name, child


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """``(out_features, in_features)`` of a linear."""
    rows, columns = module.weight.shape  # type: ignore[union-attr, misc]
    return (int(columns), int(rows)) if isinstance(module, Conv1D) else (int(rows), int(columns))


def find_blocks(skeleton: nn.Module) -> list[str]:
    """Names the decoder blocks: the items of the only outermost ``ModuleList`` with weights.

    Raises:
        UnsupportedModelError: there is none, or more than one.
    """
    stacks: dict[str, int] = {}
    for name, module in skeleton.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in stacks)
        if isinstance(module, nn.ModuleList) and not nested:
            size = sum(p.numel() for p in module.parameters())
            if size:
                stacks[name] = size
    if not stacks:
        raise UnsupportedModelError(
            f"{type(skeleton).__name__} has no stack of decoder blocks (a ModuleList with weights). Its modules are: "
            f"{listing([name for name, _ in skeleton.named_children()])}."
        )
    if len(stacks) > 1:
        raise UnsupportedModelError(
            f"{type(skeleton).__name__} has {len(stacks)} stacks of blocks, one was expected: {listing(list(stacks))}."
        )
    (stack,) = stacks
    return [f"{stack}.{index}" for index in range(len(skeleton.get_submodule(stack)))]  # type: ignore[arg-type]


def matches(pattern: str, name: str) -> bool:
    """Whether a regular expression is found anywhere in a module's name. Raises InputError for a malformed one."""
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise InputError(f"{pattern!r} is not a regular expression: {error}.") from error


def listing(names: Sequence[str], limit: int = 8) -> str:
    """The first of many names, and how many more there are, for messages."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
