"""Tells norms by what they compute: ``scale x / rms(x) + shift``, in LayerNorm with x without its mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

EPSILONS = ("variance_epsilon", "eps", "epsilon")  # names by which norms keep it


def scale_and_shift(norm: nn.Module, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What a norm multiplies the normalised features by, and then adds, for values of its parameters (float64)."""
    width = len(parameters["weight"])
    given = {name: parameter.double() for name, parameter in parameters.items()}
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(width)[:width]
    signs -= signs.mean()
    signs /= signs.square().mean().sqrt()

    def run(inputs: Tensor) -> Tensor:
        output: Any = functional_call(norm, given, (inputs[None],))
        return output[0].double()

    shift = run(torch.zeros_like(signs))
    return (run(signs) - shift) / signs * (1 + epsilon_of(norm)) ** 0.5, shift


def epsilon_of(norm: nn.Module) -> float:
    return next(float(value) for name in EPSILONS if (value := getattr(norm, name, None)) is not None)


def subtracts_mean(norm: nn.Module) -> bool | None:
    """Whether a norm is LayerNorm (True), or one by the root mean square (False); None for any other module."""
    parameters = dict(norm.named_parameters())
    if list(parameters) not in (["weight"], ["weight", "bias"]) or not any(hasattr(norm, name) for name in EPSILONS):
        return None
    width, generator = parameters["weight"].numel(), torch.Generator().manual_seed(0)
    inputs, *values = (torch.randn(shape, generator=generator) + 1 for shape in ((3, width), *((width,),) * 2))
    given = dict(zip(parameters, values, strict=False))
    try:
        output: Any = functional_call(norm, given, (inputs,))
        scale, shift = scale_and_shift(norm, given)
    except Exception:  # of any kind, by the class: it is something else
        return None
    for centred in (False, True):
        states = inputs - inputs.mean(-1, keepdim=True) if centred else inputs
        expected = scale * states / (states.square().mean(-1, keepdim=True) + epsilon_of(norm)).sqrt() + shift
        if output.shape == inputs.shape and torch.allclose(output.double(), expected, rtol=1e-4, atol=1e-5):
            return centred
    return None
