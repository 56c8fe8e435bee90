"""BlockPruner (arXiv 2406.10594): removes attentions and MLPs one by one, each time the one that is missed least.

In each round the perplexity of a text is measured without each of the branches that are left. Hidden states in front of
a branch do not depend on it: a round is one walk, on which a stream branches off wherever a branch is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from svdllm.common.errors import InputError, UnsupportedModelError
from svdllm.models.branches import Branch, find_branches
from svdllm.models.hooks import replaced
from svdllm.models.low_rank.lowrank import DroppedBranch
from svdllm.models.walk import Block, Walk
from svdllm.pruning.job import Job, Method
from svdllm.pruning.made import Made

ALL = ""  # the stream with all branches that are left
STREAM_BYTES = 2 * 2**30  # hidden states of the streams of a pass; more branches are tried in further passes


def prune(job: Job, ids: Tensor) -> Made:
    """Removes branches until as many parameters are gone as the ratio asks for."""
    left = _branches(job)
    dropped: list[Branch] = []
    history = []
    wanted = job.ratio * job.num_params
    while sum(branch.params for branch in dropped) < wanted:
        losses = losses_without(job, ids, left, dropped)
        least = min(left, key=lambda branch: losses[branch.name])
        history.append({"removed": least.name, "nll": losses[least.name]})
        dropped.append(least)
        left = [branch for branch in left if branch is not least]
    gone = tuple(f"{branch.name}." for branch in dropped)
    weights, stored = job.subject.weights, job.subject.stored
    return Made(
        layout={name: tensor for name, tensor in stored.items() if not name.startswith(gone)},
        tensors=weights,
        entry={"dropped": {branch.name: branch.num_outputs for branch in dropped}} if dropped else {},
        removed=sum(branch.params for branch in dropped),
        details={"rounds": history},
    )


def losses_without(job: Job, ids: Tensor, left: Sequence[Branch], dropped: Sequence[Branch]) -> dict[str, float]:
    """Mean negative log likelihood of the text (nats per token) without each of the branches ``left``, by name."""
    values = ids.numel() * job.subject.source.config.get_text_config().hidden_size
    at_once = max(1, STREAM_BYTES // (4 * values) - 1)
    losses: dict[str, float] = {}
    for first in range(0, len(left), at_once):
        tried = left[first : first + at_once]
        with job.walk(ids) as walk:
            streams: dict[str, Tensor] = {}
            for block in job.blocks(walk, "perplexities"):
                streams = streams or {ALL: walk.hidden.tensor.clone()}
                _advance(block, streams, tried, dropped)
            losses |= {name: _loss(walk, states) for name, states in streams.items() if name != ALL}
    return losses


def _advance(block: Block, streams: dict[str, Tensor], tried: Sequence[Branch], dropped: Sequence[Branch]) -> None:
    """Runs all streams through a block; those without one of its own branches begin here."""
    own = [branch for branch in dropped if branch.block == block.index]
    begun = {branch.name: _run(block, streams[ALL], [*own, branch]) for branch in tried if branch.block == block.index}
    for name, states in streams.items():
        streams[name] = _run(block, states, own)
    streams |= begun


def _run(block: Block, states: Tensor, dropped: Sequence[Branch]) -> Tensor:
    """The output of a block without some of its branches."""
    walk, output = block.walk, torch.empty_like(states)
    parts = {branch.name.removeprefix(f"{block.name}."): branch for branch in dropped}
    stubs = {
        name: DroppedBranch(block.module.get_submodule(name), branch.num_outputs) for name, branch in parts.items()
    }
    with replaced(block.module, stubs), torch.no_grad():
        for number, batch in enumerate(walk.batches):
            call = walk.calls[number][block.index]
            output[batch] = call.run(block.module, states[batch].to(walk.device)).hidden.to(states)
    return output


def _loss(walk: Walk, states: Tensor) -> float:
    total = 0.0
    with walk.head() as head, torch.no_grad():
        for number in range(len(states)):  # logits are wide: one window at a time
            window = slice(number, number + 1)
            logits = head(window, states[window].to(walk.device))[0, :-1].float()
            following = walk.ids[number, 1:].to(logits.device)
            total += float(torch.nn.functional.cross_entropy(logits, following, reduction="sum"))
    mean = total / (len(states) * (walk.ids.shape[1] - 1))
    return mean if math.isfinite(mean) else math.inf


def _branches(job: Job) -> list[Branch]:
    return find_branches(job.subject.skeleton, job.subject.structure)


def check(job: Job) -> None:
    """Raises unless there are branches with as many parameters as the ratio asks for.

    Raises:
        UnsupportedModelError: blocks hand values to later ones, or none adds the output of a module to its residual.
        InputError: the ratio would remove all branches.
    """
    structure = job.subject.structure
    model = type(job.subject.skeleton).__name__
    if structure.shared_arguments or structure.handed:
        raise UnsupportedModelError(
            f"The blocks of {model} hand values to later blocks, which would lack those of an attention that is "
            "removed. Use another method of pruning."
        )
    branches = _branches(job)
    most = sum(branch.params for branch in branches) - min((branch.params for branch in branches), default=0)
    if job.ratio * job.num_params > most:
        raise InputError(
            f"Ratio {job.ratio:g} would remove every attention and MLP: the {len(branches)} of {model} that can be "
            f"removed have {sum(branch.params for branch in branches) / job.num_params:.3f} of the linears' "
            "parameters, and one must stay. Choose a lower ratio."
        )


BLOCK_PRUNER = Method(
    name="blockpruner",
    summary="whole attentions and MLPs, each time the one without which the perplexity is lowest",
    source="BlockPruner, arXiv 2406.10594",
    samples=256,
    seqlen=512,
    check=check,
    prune=prune,
)
