"""Probes linears and MLPs: changes one of them alone and measures the effect on the model's predictions.

A linear is truncated, an MLP is narrowed. All probes are made in one forward walk. A linear of block ``k`` changes
nothing before block ``k``, so the stream of its probe starts there, from the hidden states of the dense stream, and is
carried to the end beside the other streams. The row of the allocation says at which sizes each unit is probed, and what
is measured.

Legend: ``T`` tokens of a window, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress, cycle
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from svdllm.checkpoint.elastic import Probes
from svdllm.common.errors import NumericalError
from svdllm.common.progress import Reporter
from svdllm.compression.analysis import Analysis
from svdllm.compression.forms import FORMS, bits_in
from svdllm.compression.math.measures import Measure
from svdllm.compression.math.metrics import METHODS
from svdllm.compression.math.rounding import Rounded
from svdllm.compression.ranks import ALLOCATIONS
from svdllm.compression.ranks.question import probed_unit, rounded
from svdllm.compression.recipe import Recipe
from svdllm.compression.rounded_targets import rounded_each
from svdllm.compression.routed import gram_values_per_token, token_shares, weights_per_token
from svdllm.models.experts_on_disk import give_back, on_disk
from svdllm.models.hooks import replaced
from svdllm.models.loaded_weights import tensors_replaced
from svdllm.models.shared_state import State, moved
from svdllm.models.structure import Structure, Target, weight_of, weights_by_name
from svdllm.models.stubs import Call
from svdllm.models.walk import Walk

WINDOW = 256
MOST_TOKENS = 8192

Sizes = Mapping[str, Sequence[int]]  # target, MLP or pool -> the sizes that it is probed at, ascending


def probe_sizes(recipe: Recipe, structure: Structure) -> dict[str, list[int]]:
    """Target or MLP -> the sizes at which it is probed, ascending; none without probing. Experts are probed by pool."""
    probing = ALLOCATIONS[recipe.allocation].probing
    if probing is None:
        return {target.unit: [] for target in structure.targets}
    units = {target.unit: target for target in structure.targets}
    curves = {FORMS[name].curve for name in recipe.used_forms}
    sizes: dict[str, list[int]] = {name: [] for name in units}
    if "truncation" in curves:
        sizes |= {name: probing.ranks(target, recipe.round_to, recipe) for name, target in units.items()}
    if any(FORMS[name].of_mlps for name in recipe.used_forms):
        widths = {side.unit: side.width for target in structure.targets if (side := target.inner) is not None}
        sizes |= {name: probing.widths(width, recipe.round_to, recipe) for name, width in widths.items()}
    if bits := bits_in(recipe.used_forms):
        able = [target for target in structure.targets if FORMS[f"int{bits[0]}"].sizes(target, 1)]
        sizes |= {rounded(target.name): probing.bits(bits, recipe) for target in able}
        for target in structure.vocabulary:
            sizes[rounded(target.name)] = [each for each in bits if FORMS[f"int{each}"].sizes(target, 1)]
    return sizes


def probe_ids(ids: Tensor, num_tokens: int) -> Tensor:
    """The beginnings of evenly spaced calibration windows: about ``num_tokens`` token ids in all."""
    length = min(WINDOW, ids.shape[1], max(2, num_tokens))
    count = min(len(ids), max(1, num_tokens // length))
    chosen = torch.arange(count) * len(ids) // count
    return ids[chosen, :length]


def probe_tokens(recipe: Recipe, structure: Structure, skeleton: PreTrainedModel) -> int:
    """The number of tokens with which probing is ``probe_share`` of the work of calibration and probing together.

    Work is counted in multiplications, not in seconds, so that a recipe probes the same tokens on every machine. The
    work of calibration is the forward pass of the text, even for a method that does not need it, and the Grams. Experts
    count for the tokens that are routed to them.
    """
    head: Any = skeleton.get_output_embeddings()
    gram = METHODS[recipe.method].collects_gram
    shares = token_shares(structure, skeleton)
    forward = weights_per_token(structure, shares)
    calibration = recipe.samples * recipe.seqlen * (forward + gram * gram_values_per_token(structure, shares) / 2)
    num_blocks = len(structure.blocks)
    sizes, block_of = probe_sizes(recipe, structure), structure.block_of
    per_token = sum(
        len(tried) * (forward * (num_blocks - block_of[probed_unit(name)]) / num_blocks + head.weight.numel())
        for name, tried in sizes.items()
    )
    wanted = recipe.probe_share / (1 - recipe.probe_share) * calibration / max(per_token, 1)
    return max(2, min(MOST_TOKENS, recipe.samples * min(recipe.seqlen, WINDOW), int(wanted)))


def probe(
    walk: Walk,
    analysis: Analysis,
    sizes: Sizes,
    measure: Measure,
    reporter: Reporter,
    streams_folder: Path | None = None,
) -> Probes:
    """Probes every target and MLP at its sizes; the experts of a layer all at once.

    The processes that share the walk carry all tokens, and each makes some of the probes.

    Args:
        walk: carries the tokens of the probes, all in one batch.
        streams_folder: keeps the streams in files there, which have no names; in memory without it.

    Raises:
        NumericalError: a measured value is not finite; names the linear or MLP.
    """
    assert len(walk.batches) == 1
    streams: dict[tuple[str, int], _Stream] = {}
    mine = cycle(rank == walk.processes.rank for rank in range(walk.processes.count))
    num_streams = -(-sum(map(len, sizes.values())) // walk.processes.count)
    outside = _rounded_vocabulary(walk, sizes)
    with reporter.stage("probe", num_streams), torch.no_grad():
        for block in walk.blocks():
            if block.index == 0:
                shared = walk.hidden.shared.before(0, 0)
                embedded = {
                    key: on_disk(_embedded(walk, own.weights()), streams_folder) for key, own in outside.items()
                }
                streams |= {key: _Stream(hidden, shared) for key, hidden in embedded.items()}
            call = walk.calls[0][block.index]
            dense = _Stream(walk.hidden.tensor, walk.hidden.shared.before(0, block.index))
            for key, stream in streams.items():
                streams[key] = stream.through(call, block.module, walk.device, streams_folder)
            for members in compress(_units(walk.structure.block_targets(block.index)), mine):
                for name, size, weights in _trials(walk, analysis, members, sizes):
                    with tensors_replaced(walk.skeleton, weights):
                        streams[name, size] = dense.through(call, block.module, walk.device, streams_folder)
                reporter.advance(min(len(streams), num_streams), num_streams)
            block.run()
        ends = [(stream.hidden, outside.get(key)) for key, stream in streams.items()]
        found = [(*key, value) for key, value in zip(streams, _measured(walk, ends, measure), strict=True)]
        measured = {(name, size): value for own in walk.processes.gather(found) for name, size, value in own}
    for (name, size), value in measured.items():
        if not isfinite(value):
            raise NumericalError(
                f"With {name} cut to {size} the logits are not finite; leave it dense with --ignore, or choose "
                "another --allocation."
            )
    return {name: {size: measured[name, size] for size in sizes[name]} for name in sizes}


class _Stream(NamedTuple):
    """The hidden and shared states between two blocks of the dense model, or of a model with one linear truncated."""

    hidden: Tensor
    shared: State

    def through(self, call: Call, block: nn.Module, device: torch.device, folder: Path | None) -> _Stream:
        """The stream after a block, in files of a folder if there is one."""
        hidden, written = call.run(block, self.hidden.to(device), self.shared)
        kept = moved(written, lambda tensor: on_disk(tensor.cpu(), folder))
        return _Stream(on_disk(hidden.cpu(), folder), {**self.shared, **kept})


def _units(targets: Sequence[Target]) -> list[list[Target]]:
    """The targets that are changed together: each alone, or those of a pool."""
    units: dict[str, list[Target]] = {}
    for target in targets:
        units.setdefault(target.unit, []).append(target)
    return list(units.values())


def _trials(
    walk: Walk, analysis: Analysis, members: Sequence[Target], sizes: Sizes
) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
    """Yields what is tried on some targets of one shape, the size, and their weights then, one at a time.

    An MLP is narrowed in the weight of the linear that reads its inner features: the columns of the others are zero.
    A linear is rounded by itself.
    """
    unit, inner = members[0].unit, members[0].inner
    scratch = None if members[0].pool is None else walk.scratch
    most = max(sizes[unit], default=0)
    factors = [[on_disk(f, scratch) for f in _factors(walk, analysis, t, most)] for t in members if most]
    for rank in sizes[unit]:
        weights = (on_disk(u_OR[:, :rank] @ v_RI[:rank], scratch) for u_OR, v_RI in factors)
        yield unit, rank, _by_name(members, weights)
    if inner is not None and inner.side == "in":
        for width in sizes.get(inner.unit, ()):
            weights = (on_disk(_narrowed(walk, analysis, target, width), scratch) for target in members)
            yield inner.unit, width, _by_name(members, weights)
    for bits in sizes.get(rounded(unit), ()):
        weights = (_in_bits(walk, analysis, target, bits) for target in members)
        yield rounded(unit), bits, _by_name(members, weights)


def _by_name(targets: Sequence[Target], weights: Iterable[Tensor]) -> dict[str, Tensor]:
    pairs = zip(targets, weights, strict=True)
    return {name: tensor for target, weight_OI in pairs for name, tensor in weights_by_name(target, weight_OI).items()}


def _factors(walk: Walk, analysis: Analysis, target: Target, rank: int) -> tuple[Tensor, Tensor]:
    """``U`` and ``V`` of a target, whose leading parts are those of smaller ranks."""
    weight_OI = weight_of(walk.skeleton, target)
    spectrum = analysis.spectrum(target).to(weight_OI.device, weight_OI.dtype)
    return spectrum.basis_OD, spectrum.rows(weight_OI, rank).to(weight_OI.dtype)


def _in_bits(walk: Walk, analysis: Analysis, target: Target, bits: int) -> Tensor:
    weight_OI, metric = weight_of(walk.skeleton, target), analysis.metric(target)
    metric = None if metric is None else metric.to(weight_OI)
    dtype = walk.weights.shape_and_dtype(f"{target.name}.weight")[1]
    return rounded_each(target, weight_OI, metric, [bits], dtype)[0].matrix.to(weight_OI.dtype)


def _narrowed(walk: Walk, analysis: Analysis, target: Target, width: int) -> Tensor:
    weight_OI = weight_of(walk.skeleton, target)
    assert target.inner is not None
    narrowing = analysis.narrowing(target.block, target.inner.mlp).to(weight_OI.device)
    return narrowing.consumer(weight_OI, width).to(weight_OI.dtype)


class _Outside(NamedTuple):
    """A rounded embedding or head, under all names of its weight; unpacked when it is used."""

    names: tuple[str, ...]
    rounded: Rounded
    dtype: torch.dtype

    def weights(self) -> dict[str, Tensor]:
        return dict.fromkeys(self.names, self.rounded.matrix.to(self.dtype))


def _rounded_vocabulary(walk: Walk, sizes: Sizes) -> dict[tuple[str, int], _Outside]:
    """Probe of the embedding or the head -> what is changed; those of this process."""
    found: dict[tuple[str, int], _Outside] = {}
    processes = walk.processes
    for target in walk.structure.vocabulary:
        name = f"{target.name}.weight"
        weight_OI = walk.weights.get(name).to(walk.device)
        # one by one: together they would take much memory
        for bits in sizes.get(rounded(target.name), ())[processes.rank :: processes.count]:
            (made,) = rounded_each(target, weight_OI, None, [bits], weight_OI.dtype)
            found[rounded(target.name), bits] = _Outside((name, *walk.ties.get(name, ())), made, walk.dtype)
    return found


def _embedded(walk: Walk, weights: Mapping[str, Tensor]) -> Tensor:
    """The hidden states before the first block, with other weights outside the blocks."""
    recorders = walk.recorders()
    with (
        walk.outside_loaded(everything=True),
        tensors_replaced(walk.skeleton, weights),
        replaced(walk.skeleton, recorders),
        torch.no_grad(),
    ):
        walk.skeleton.base_model(input_ids=walk.ids.to(walk.device), use_cache=False)
    return recorders[walk.structure.blocks[0]].hidden.cpu()


def _measured(walk: Walk, streams: list[tuple[Tensor, _Outside | None]], measure: Measure) -> list[float]:
    """The measure of each stream's predictions, averaged over the windows; the logits of one window fit in memory.

    A stream has its hidden states, and what is changed outside the blocks.
    """
    totals = [0.0] * len(streams)
    with walk.head() as head:

        def log_probabilities(window: slice, hidden: Tensor) -> Tensor:
            logits_TV = head(window, hidden[window].to(walk.device))[0]
            return (logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()).log_softmax(-1)

        for number, ids_T in enumerate(walk.ids):
            window = slice(number, number + 1)
            measure_of = measure(log_probabilities(window, walk.hidden.tensor), ids_T)
            for index, (stream, outside) in enumerate(streams):
                with tensors_replaced(walk.skeleton, outside.weights() if outside else {}):
                    totals[index] += measure_of(log_probabilities(window, stream))
                give_back(stream)
    return [total / len(walk.ids) for total in totals]
