"""Probes linears: truncates one linear alone and measures the effect on the model's predictions.

All probes are made in one forward walk. A linear of block ``k`` changes nothing before block ``k``, so the stream of
its probe starts there, from the hidden states of the dense stream, and is carried to the end beside the other streams.
The row of the allocation says at which ranks each linear is probed, and what is measured.

Legend: ``T`` tokens of a window, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from svdllm.checkpoint.elastic import Probes
from svdllm.common.errors import NumericalError
from svdllm.common.progress import Reporter
from svdllm.compression.analysis import Analysis
from svdllm.compression.math.linalg import Spectrum
from svdllm.compression.math.measures import Measure
from svdllm.compression.math.metrics import METHODS
from svdllm.compression.ranks import ALLOCATIONS
from svdllm.compression.recipe import Recipe
from svdllm.models.loaded_weights import tensors_replaced
from svdllm.models.shared_state import State, moved
from svdllm.models.structure import Structure, weight_of, weights_by_name
from svdllm.models.stubs import Call
from svdllm.models.walk import Walk

WINDOW = 256
MOST_TOKENS = 8192

Ranks = Mapping[str, Sequence[int]]  # target -> the ranks that it is probed at, ascending


def probe_ranks(recipe: Recipe, structure: Structure) -> dict[str, list[int]]:
    """Target -> the ranks at which it is probed, ascending; empty without probing."""
    probing = ALLOCATIONS[recipe.allocation].probing
    if probing is None:
        return {target.name: [] for target in structure.targets}
    return {target.name: probing.ranks(target, recipe.round_to, recipe) for target in structure.targets}


def probe_ids(ids: Tensor, num_tokens: int) -> Tensor:
    """The beginnings of evenly spaced calibration windows: about ``num_tokens`` token ids in all."""
    length = min(WINDOW, ids.shape[1], max(2, num_tokens))
    count = min(len(ids), max(1, num_tokens // length))
    chosen = torch.arange(count) * len(ids) // count
    return ids[chosen, :length]


def probe_tokens(recipe: Recipe, structure: Structure, skeleton: PreTrainedModel) -> int:
    """The number of tokens with which probing is ``probe_share`` of the work of calibration and probing together.

    Work is counted in multiplications, not in seconds, so that a recipe probes the same tokens on every machine. The
    work of calibration is the forward pass of the text, even for a method that does not need it, and the Grams.
    """
    head: Any = skeleton.get_output_embeddings()
    gram = METHODS[recipe.method].collects_gram
    widths = {target.group: target.in_features for target in structure.targets}
    forward = structure.num_target_params
    calibration = recipe.samples * recipe.seqlen * (forward + gram * sum(width**2 for width in widths.values()) / 2)
    num_blocks = len(structure.blocks)
    ranks = probe_ranks(recipe, structure)
    per_token = sum(
        len(ranks[target.name]) * (forward * (num_blocks - target.block) / num_blocks + head.weight.numel())
        for target in structure.targets
    )
    wanted = recipe.probe_share / (1 - recipe.probe_share) * calibration / max(per_token, 1)
    return max(2, min(MOST_TOKENS, recipe.samples * min(recipe.seqlen, WINDOW), int(wanted)))


def probe(walk: Walk, analysis: Analysis, ranks: Ranks, measure: Measure, reporter: Reporter) -> Probes:
    """Probes every target at its ranks.

    Args:
        walk: carries the tokens of the probes, all in one batch.

    Raises:
        NumericalError: a measured value is not finite; names the linear.
    """
    assert len(walk.batches) == 1
    streams: dict[tuple[str, int], _Stream] = {}
    num_streams = sum(map(len, ranks.values()))
    with reporter.stage("probe", num_streams), torch.no_grad():
        for block in walk.blocks():
            call = walk.calls[0][block.index]
            dense = _Stream(walk.hidden.tensor, walk.hidden.shared.before(0, block.index))
            for key, stream in streams.items():
                streams[key] = stream.through(call, block.module, walk.device)
            for target in walk.structure.block_targets(block.index):
                weight_OI = weight_of(walk.skeleton, target)
                products = _truncations(weight_OI, analysis.spectrum(target), ranks[target.name])
                for rank, product_OI in products:
                    with tensors_replaced(walk.skeleton, weights_by_name(target, product_OI)):
                        streams[target.name, rank] = dense.through(call, block.module, walk.device)
                reporter.advance(len(streams), num_streams)
            block.run()
        ends = [stream.hidden for stream in streams.values()]
        measured = dict(zip(streams, _measured(walk, ends, measure), strict=True))
    for (name, rank), value in measured.items():
        if not isfinite(value):
            raise NumericalError(
                f"With {name} truncated to rank {rank} the logits are not finite; leave it dense with --ignore, or "
                "choose another --allocation."
            )
    return {name: {rank: measured[name, rank] for rank in ranks[name]} for name in ranks}


class _Stream(NamedTuple):
    """The hidden and shared states between two blocks of the dense model, or of a model with one linear truncated."""

    hidden: Tensor
    shared: State

    def through(self, call: Call, block: nn.Module, device: torch.device) -> _Stream:
        hidden, written = call.run(block, self.hidden.to(device), self.shared)
        return _Stream(hidden.cpu(), {**self.shared, **moved(written, Tensor.cpu)})


def _truncations(weight_OI: Tensor, spectrum: Spectrum, ranks: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Yields each rank with the best weight of that rank, one at a time."""
    spectrum = spectrum.to(weight_OI.device, weight_OI.dtype)
    dual_DO = spectrum.basis_OD.mT if spectrum.dual_DO is None else spectrum.dual_DO
    coefficients_RI = dual_DO[: max(ranks, default=0)] @ weight_OI
    for rank in ranks:
        yield rank, spectrum.basis_OD[:, :rank] @ coefficients_RI[:rank]


def _measured(walk: Walk, streams: list[Tensor], measure: Measure) -> list[float]:
    """The measure of each stream's predictions, averaged over the windows; the logits of one window fit in memory."""
    totals = [0.0] * len(streams)
    with walk.head() as head:

        def log_probabilities(window: slice, hidden: Tensor) -> Tensor:
            logits_TV = head(window, hidden[window].to(walk.device))[0]
            return (logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()).log_softmax(-1)

        for number, ids_T in enumerate(walk.ids):
            window = slice(number, number + 1)
            measure_of = measure(log_probabilities(window, walk.hidden.tensor), ids_T)
            for index, stream in enumerate(streams):
                totals[index] += measure_of(log_probabilities(window, stream))
    return [total / len(walk.ids) for total in totals]
