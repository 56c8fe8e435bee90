"""Finds the decoder blocks of a model and the linears in them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from svdllm.common.errors import InputError, UnsupportedModelError


def has_matrix(module: nn.Module) -> bool:
    """Whether a module is made as a linear: ``nn.Linear``, GPT-2's ``Conv1D`` or a subclass, with a matrix."""
    return isinstance(module, nn.Linear | Conv1D) and module.weight.ndim == 2


def is_linear(module: nn.Module) -> bool:
    """Whether a module has the matrix of a linear and computes no more than ``y = W x + b``.

    Subclasses with a forward of their own are tried: some routers return their choices in place of the product.
    """
    plain = (nn.Linear.forward, Conv1D.forward)
    return has_matrix(module) and (type(module).forward in plain or _multiplies(module))


def _multiplies(module: nn.Module) -> bool:
    """Whether a linear returns the product with its weight, and its bias added: tried with three outputs of five."""
    weight, bias, inputs = torch.linspace(-1, 1, 15).view(3, 5), torch.linspace(2, 4, 3), torch.eye(5)
    tensors: dict[str, Tensor] = {"weight": weight.mT.contiguous() if isinstance(module, Conv1D) else weight}
    if has_bias := module.bias is not None:
        tensors["bias"] = bias
    try:
        with torch.no_grad():
            output: Any = functional_call(module, tensors, (inputs,), strict=True)
    except Exception:  # of any kind, by the class: it does something else
        return False
    expected = inputs @ weight.mT + (bias if has_bias else 0)
    return isinstance(output, Tensor) and output.shape == expected.shape and torch.allclose(output, expected, atol=1e-5)


def linears_of(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields every linear in ``module`` with its full name."""
    for name, child in module.named_modules(prefix=prefix):
        if is_linear(child):
            yield name, child


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """``(out_features, in_features)`` of a linear."""
    rows, columns = module.weight.shape  # type: ignore[union-attr, misc]
    return (int(columns), int(rows)) if isinstance(module, Conv1D) else (int(rows), int(columns))


def language_model(model: nn.Module) -> tuple[str, nn.Module]:
    """The part of a model that reads text, with its name: the decoder that transformers finds; else the whole."""
    find = getattr(model, "get_decoder", None)
    decoder = None if find is None else find()
    name = next((name for name, module in model.named_modules() if module is decoder), None)
    if decoder is None or name is None or not stacks_of(decoder, ""):
        return "", model
    return name, decoder


def find_blocks(model: nn.Module) -> list[str]:
    """Names the decoder blocks: the items of the largest outermost ``ModuleList`` of the language model.

    A list in a model inside it, such as an encoder of images, counts if there is no other.

    Raises:
        UnsupportedModelError: there is none with weights.
    """
    name, decoder = language_model(model)
    stacks = stacks_of(decoder, name)
    if not stacks:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no stack of decoder blocks (a ModuleList with weights). Its modules are: "
            f"{listing([name for name, _ in model.named_children()])}."
        )
    parts = [part for part, module in decoder.named_modules(prefix=name) if isinstance(module, PreTrainedModel)]
    inner = tuple(f"{part}." for part in parts if part != name)
    own = [stack for stack in stacks if not stack.startswith(inner)]
    stack = max(own or stacks, key=lambda name: sum(parameter.numel() for parameter in stacks[name].parameters()))
    return [f"{stack}.{index}" for index in range(len(stacks[stack]))]


def stacks_of(model: Any, prefix: str) -> dict[str, nn.ModuleList]:
    """The outermost ``ModuleList`` with weights, by their names."""
    stacks: dict[str, nn.ModuleList] = {}
    seen: set[nn.Module] = set()

    def visit(name: str, module: nn.Module) -> None:
        seen.add(module)
        if isinstance(module, nn.ModuleList) and any(parameter.numel() for parameter in module.parameters()):
            stacks[name] = module
            return
        for child, inner in module.named_children():
            if inner not in seen:
                visit(f"{name}.{child}" if name else child, inner)

    visit(prefix, model)
    return stacks


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
