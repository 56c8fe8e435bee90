"""Probing: how much the model's predictions change when one linear alone is truncated.

For linear ``i`` the probe is ``KL(dense || model with only i at rank r0)`` per token, ``r0`` a tenth of break-even. All
probes are made in one forward walk: a linear of block ``k`` changes nothing before block ``k``, so its stream starts
there, from the dense stream's hidden states, and rides along with the others to the end.
"""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from svdllm.allocation import Probe
from svdllm.analysis import Analysis
from svdllm.calibration import weight_of
from svdllm.config import Recipe
from svdllm.errors import NumericalError
from svdllm.linalg import Spectrum
from svdllm.methods import METHODS
from svdllm.progress import Reporter
from svdllm.statistics import Gram
from svdllm.stream import Walk
from svdllm.structure import Structure, Target

PROBE_SHARE_OF_BREAK_EVEN = 0.1
WINDOW = 256
MOST_TOKENS = 8192


def probe_rank(target: Target) -> int:
    return max(1, round(PROBE_SHARE_OF_BREAK_EVEN * target.break_even_rank))


def probe_ids(ids: Tensor, num_tokens: int) -> Tensor:
    """Beginnings of calibration windows, spread evenly over them: about ``num_tokens`` tokens in all."""
    length = min(WINDOW, ids.shape[1], max(2, num_tokens))
    count = min(len(ids), max(1, num_tokens // length))
    chosen = torch.arange(count) * len(ids) // count
    return ids[chosen, :length]


def probe_tokens(recipe: Recipe, structure: Structure, skeleton: PreTrainedModel) -> int:
    """As many tokens as make probing ``probe_share`` of the work of calibration and probing together.

    Counted in multiplications, not in seconds: the same recipe probes the same tokens on every machine.
    """
    head: Any = skeleton.get_output_embeddings()
    gram = METHODS[recipe.method].statistic is Gram
    widths = {target.group: target.in_features for target in structure.targets}
    forward = structure.num_target_params
    calibration = recipe.samples * recipe.seqlen * (forward + gram * sum(width**2 for width in widths.values()) / 2)
    num_blocks = len(structure.blocks)
    per_token = sum(
        forward * (num_blocks - target.block) / num_blocks + head.weight.numel() for target in structure.targets
    )
    wanted = recipe.probe_share / (1 - recipe.probe_share) * calibration / per_token
    return max(2, min(MOST_TOKENS, int(wanted)))


def probe(walk: Walk, analysis: Analysis, reporter: Reporter) -> dict[str, Probe]:
    """Probes every target; ``walk`` carries the probe's tokens, all in one batch.

    Raises:
        NumericalError: a divergence is not finite; names the linear.
    """
    assert len(walk.batches) == 1
    streams: dict[str, Tensor] = {}
    targets = walk.structure.targets
    with reporter.stage("probe", len(targets)), torch.no_grad():
        for block in walk.blocks():
            call = walk.calls[0][block.index]
            for name, hidden in streams.items():
                streams[name] = call.run(block.module, hidden.to(walk.device)).cpu()
            for target in walk.structure.block_targets(block.index):
                with _truncated(walk, target, analysis.spectrum(target)):
                    streams[target.name] = call.run(block.module, walk.hidden.tensor.to(walk.device)).cpu()
                reporter.advance(len(streams), len(targets))
            block.run()
        divergences = _divergences(walk, [streams[target.name] for target in targets])
    for target, divergence in zip(targets, divergences, strict=True):
        if not isfinite(divergence):
            raise NumericalError(
                f"With {target.name} truncated to rank {probe_rank(target)} the logits are not finite; leave it dense "
                "with --ignore, or choose another --allocation."
            )
    return {
        target.name: Probe(probe_rank(target), divergence)
        for target, divergence in zip(targets, divergences, strict=True)
    }


class _truncated:
    """A target of the resident block has its truncated weight while the context lasts."""

    def __init__(self, walk: Walk, target: Target, spectrum: Spectrum):
        self.module: Any = walk.skeleton.get_submodule(target.name)
        self.dense = self.module.weight.data
        weight_OI = weight_of(self.module, target)
        spectrum = spectrum.to(weight_OI.device, weight_OI.dtype)
        rank = probe_rank(target)
        dual_DO = spectrum.basis_OD.mT if spectrum.dual_DO is None else spectrum.dual_DO
        product_OI = spectrum.basis_OD[:, :rank] @ (dual_DO[:rank] @ weight_OI)
        self.truncated = (product_OI.mT if target.is_conv1d else product_OI).contiguous()

    def __enter__(self) -> None:
        self.module.weight.data = self.truncated

    def __exit__(self, *_: object) -> None:
        self.module.weight.data = self.dense


def _divergences(walk: Walk, streams: list[Tensor]) -> list[float]:
    """Mean KL divergence of each stream's predictions from the dense stream's, one window at a time."""
    totals = [0.0] * len(streams)
    with walk.head() as head:

        def log_probabilities(window: slice, hidden: Tensor) -> Tensor:
            logits = head(window, hidden[window].to(walk.device))
            return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)

        for number in range(len(walk.ids)):
            window = slice(number, number + 1)
            dense = log_probabilities(window, walk.hidden.tensor)
            probabilities = dense.exp()
            for index, stream in enumerate(streams):
                difference = dense - log_probabilities(window, stream)
                # Equal to p log(p/q) summed, but no term is negative: small divergences do not drown in rounding.
                totals[index] += float(
                    (probabilities * (difference + torch.expm1(-difference))).sum(dtype=torch.float64)
                )
    return [total / walk.ids.numel() for total in totals]
