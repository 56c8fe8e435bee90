"""LLM-Pruner (arXiv 2305.11627): removes heads and neurons whose weights change the loss least, to first order.

The model is not pruned at its ends: the first eighth and the last sixteenth of its blocks stay whole. All others lose
the same share of their heads and of their neurons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from svdllm.models.channels import Channels
from svdllm.models.logits import loss_gradient
from svdllm.models.structure import Target
from svdllm.models.walk import Block
from svdllm.pruning.job import Job, Method
from svdllm.pruning.made import Made
from svdllm.pruning.narrowed import Narrowed

FIRST, LAST = 4 / 32, 2 / 32  # shares of the blocks that stay whole: blocks 4 to 29 of LLaMA-7B's 32 are pruned


def pruned_blocks(num_blocks: int) -> range:
    """The blocks that lose channels."""
    return range(math.ceil(FIRST * num_blocks), num_blocks - math.ceil(LAST * num_blocks)) or range(num_blocks)


def importance(channels: Channels, saliences: Mapping[str, Tensor]) -> Tensor:
    """Sums of ``|w dL/dw|`` over all weights of a group (``G``, float64).

    Args:
        saliences: ``|w dL/dw|`` of every linear (``out x in``).
    """
    by_linear = [channels.sums(name, saliences[name].double().sum(1)) for name in channels.producers]
    return torch.stack(
        [*by_linear, channels.sums(channels.consumer, saliences[channels.consumer].double().sum(0))]
    ).sum(0)


def kept_groups(channels: Sequence[Channels], prices: Mapping[str, int], params: float) -> dict[str, int]:
    """How many groups each of the channels keeps, one at least, so that ``params`` parameters go.

    Attentions lose the nearest number of heads to the share that all lose. MLPs lose the rest in equal shares.
    """
    share = params / sum(prices[each.name] * each.num_groups for each in channels)
    heads, mlps = ([each for each in channels if each.are_heads is kind] for kind in (True, False))
    removed = {each.name: min(each.num_groups - 1, round(share * each.num_groups)) for each in heads}
    left = params - sum(prices[name] * number for name, number in removed.items())
    for index, each in enumerate(mlps):
        others = sum(prices[other.name] * other.num_groups for other in mlps[index:])
        removed[each.name] = max(0, min(each.num_groups - 1, math.ceil(left / others * each.num_groups)))
        left -= removed[each.name] * prices[each.name]
    while left > 0:  # MLPs have one neuron left, or there are none
        each = min(heads, key=lambda each: removed[each.name] - each.num_groups)
        removed[each.name] += 1
        left -= prices[each.name]
    return {each.name: each.num_groups - removed[each.name] for each in channels}


def prune(job: Job, ids: Tensor) -> Made:
    """Takes gradients of the loss of a few short texts, and removes the groups of least importance in each block."""
    channels, targets = _pruned(job), job.targets
    if not job.ratio:
        return Narrowed(job.subject, (), {}).made()
    scores: dict[str, Tensor] = {}
    with job.walk(ids, gradients=True) as walk:
        for block in job.blocks(walk, "forward"):
            block.run()
        with job.reporter.stage("backward", len(walk.structure.blocks)):
            for block in walk.reversed_blocks(lambda windows, logits: loss_gradient(ids[windows], logits)):
                own = [each for each in channels if each.block == block.index]
                names = dict.fromkeys(name for each in own for name in each.linears)
                saliences = _saliences(block, [targets[name] for name in names])
                scores |= {each.name: importance(each, saliences).cpu() for each in own}
                job.reporter.advance(len(walk.structure.blocks) - block.index, len(walk.structure.blocks))
    prices = {each.name: each.params_per_group(targets) for each in channels}
    numbers = kept_groups(channels, prices, job.ratio * job.num_params)
    groups = {}
    for each in channels:
        groups[each.name] = torch.zeros(each.num_groups, dtype=torch.bool)
        groups[each.name][scores[each.name].topk(numbers[each.name]).indices] = True
    return Narrowed(job.subject, channels, groups).made()


def _saliences(block: Block, targets: Sequence[Target]) -> dict[str, Tensor]:
    """Runs a block backward; ``|w dL/dw|`` of some linears (``out x in``)."""
    weights: dict[str, Any] = {target.name: block.walk.skeleton.get_submodule(target.name).weight for target in targets}
    for weight in weights.values():
        weight.requires_grad_(True)
    block.run_backward()
    saliences = {}
    for target in targets:
        weight = weights[target.name]
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        saliences[target.name] = target.stacked([(weight.detach() * gradient).abs()])
        weight.requires_grad_(False)
        weight.grad = None
    return saliences


def _pruned(job: Job) -> list[Channels]:
    blocks = pruned_blocks(len(job.subject.structure.blocks))
    return [each for each in job.channels if each.block in blocks]


LLM_PRUNER = Method(
    name="llm-pruner",
    summary="heads and neurons of least first-order effect on the loss",
    source="LLM-Pruner, arXiv 2305.11627",
    samples=10,
    seqlen=64,
    check=lambda job: job.require_channels(_pruned(job)),
    prune=prune,
)
