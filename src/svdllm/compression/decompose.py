"""Decomposes the weights of a block: spectra of its linears, and how its MLPs are narrowed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from svdllm.common.errors import NumericalError
from svdllm.compression.collect import left_metric_of
from svdllm.compression.forms import FORMS
from svdllm.compression.math.linalg import Spectrum, energy_alone, output_spectrum
from svdllm.compression.math.narrowing import Narrowing
from svdllm.compression.math.pullback import Pullback
from svdllm.compression.rounded_targets import Roundings, rounding_errors
from svdllm.models.experts_on_disk import give_back
from svdllm.models.structure import Target, weight_of
from svdllm.models.walk import Block


class Decomposed(NamedTuple):
    """Of some targets of a block: spectra, narrowings by MLP, errors of rounding, and seconds."""

    spectra: dict[str, Spectrum]
    narrowings: dict[str, Narrowing]
    roundings: dict[str, Roundings]
    seconds: dict[str, float]


def cost(target: Target) -> float:
    """Work of a decomposition, in operations: the eigenvectors of the smaller side, and the products with the metrics.

    It compares targets with each other, so that they are shared evenly among processes.
    """
    rows, columns, rank = target.out_features, target.in_features, target.full_rank
    return 10.0 * rank**3 + 2 * rank * columns * (rank + columns) + (rows > columns) * 4 * rows * columns * columns


def decompose(
    block: Block,
    targets: list[Target],
    metric_of: Callable[[Target], Tensor | None],
    depths: Mapping[str, int],
    lefts: dict[str, Tensor | Pullback],
    consumers: Sequence[Target] = (),
    bits: Sequence[int] = (),
    corrected: Sequence[int] = (),
) -> Decomposed:
    """Decomposes the weights of a block's targets.

    Args:
        metric_of: gives the right metric of a target; called once per group.
        depths: target -> directions of its basis to keep; of 0, the energy alone is computed.
        lefts: target -> left metric, which is taken out; targets without one are measured in their outputs as they are.
        consumers: of the targets, those that read the inner features of an MLP that may be narrowed.
        bits: in which the targets may be stored.
        corrected: of these, those that may have a low-rank correction.

    Raises:
        NumericalError: a spectrum does not converge; names the linear.
    """
    spectra: dict[str, Spectrum] = {}
    narrowings: dict[str, Narrowing] = {}
    roundings: dict[str, Roundings] = {}
    seconds: dict[str, float] = {}
    metrics: dict[str, Tensor | None] = {}
    stored_dtype = torch.float64 if block.walk.dtype == torch.float64 else torch.float32
    for target in targets:
        started = time.perf_counter()
        if target.group not in metrics:
            metrics = {target.group: metric_of(target)}  # the previous group's is not needed again
        weight_OI = weight_of(block.walk.skeleton, target)
        metric = metrics[target.group]
        metric = metric if metric is None else metric.to(weight_OI.device)
        try:
            left = left_metric_of(target, weight_OI, metric, lefts.pop(target.name, None))
            if depths[target.name]:
                depth = depths[target.name]
                spectrum = output_spectrum(weight_OI, metric, depth, left=left, dtype=stored_dtype)
            else:  # nothing will be truncated
                spectrum = energy_alone(weight_OI, metric, left)
            if target in consumers and target.inner is not None and metric is not None:
                assert not isinstance(left, Pullback)
                narrowings[target.inner.mlp] = Narrowing.of(weight_OI, metric, left).to(dtype=stored_dtype)
            if bits and FORMS[f"int{bits[0]}"].sizes(target, 1):
                assert not isinstance(left, Pullback)
                dtype = block.walk.weights.shape_and_dtype(f"{target.name}.weight")[1]
                roundings[target.name] = rounding_errors(target, weight_OI, metric, left, bits, dtype, corrected)
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise NumericalError(f"The spectrum of {target.name} did not converge: {error}") from error
        give_back(weight_OI)
        spectra[target.name] = spectrum.to(dtype=stored_dtype)
        seconds[target.name] = time.perf_counter() - started
    return Decomposed(spectra, narrowings, roundings, seconds)
