"""FLAP (arXiv 2312.11983): removes channels that fluctuate least, and adds what they gave on average to biases.

Legend: I input features of the linear that reads the channels (``o_proj``, ``down_proj``), G their groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from svdllm.models.channels import Channels
from svdllm.models.hooks import first_argument
from svdllm.models.structure import Target, weight_of
from svdllm.models.walk import Block
from svdllm.pruning.job import Job, Method
from svdllm.pruning.made import Made
from svdllm.pruning.narrowed import Narrowed


class Moments:
    """Mean and variance (``I``, float64) of inputs; of tokens, whatever the shape in front of the features."""

    def __init__(self) -> None:
        self.tokens, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, inputs: Tensor) -> None:
        """Adds a batch (``... x I``), as in Welford's method for batches."""
        own = inputs.detach().flatten(end_dim=-2).double()
        mean = own.mean(0)
        delta = mean - self.mean.to(mean)
        total = self.tokens + len(own)
        self.squares = self.squares.to(mean) + (own - mean).square().sum(0) + delta**2 * self.tokens * len(own) / total
        self.mean = self.mean.to(mean) + delta * len(own) / total
        self.tokens = total

    @property
    def variance(self) -> Tensor:
        return self.squares / self.tokens


def fluctuations(weight_OI: Tensor, variance_I: Tensor) -> Tensor:
    """``S_j = var(x_j) ||W_:j||^2``: what the outputs lose if a feature is replaced by its mean (WIFV)."""
    return variance_I * weight_OI.double().square().sum(0)


def standardised(scores: Tensor) -> Tensor:
    """``(S - mean) / std`` over the features of a layer, so that layers can be compared; zeros if all are equal."""
    spread = scores.std()
    return torch.zeros_like(scores) if not float(spread) > 0 else (scores - scores.mean()) / spread


def group_scores(channels: Channels, scores_I: Tensor) -> Tensor:
    """Scores of groups (``G``): of heads the mean of the squared scores of their features, standardised."""
    scores_I = standardised(scores_I.square() if channels.are_heads else scores_I)
    columns = channels.columns.bincount().to(scores_I)
    return channels.sums(channels.consumer, scores_I) / columns


def best_groups(
    channels: Sequence[Channels], scores: Mapping[str, Tensor], prices: Mapping[str, int], params: float
) -> dict[str, Tensor]:
    """The groups that stay: the best of all layers together, as many as have ``params`` parameters.

    The best group of each layer stays in any case.

    Args:
        scores: name of channels -> score of each group.
        prices: name of channels -> parameters of a group.

    Returns:
        Name of channels -> mask of the groups.
    """
    kept = {each.name: torch.zeros(each.num_groups, dtype=torch.bool) for each in channels}
    for name, mask in kept.items():
        mask[int(scores[name].argmax())] = True
    left = params - sum(prices[name] for name in kept)
    ranked = sorted(
        ((score, name, group) for name in kept for group, score in enumerate(scores[name].tolist())),
        key=lambda entry: -entry[0],
    )
    for _, name, group in ranked:
        if kept[name][group]:
            continue
        left -= prices[name]
        if left < 0:
            break
        kept[name][group] = True
    return kept


def prune(job: Job, ids: Tensor) -> Made:
    """Scores the inputs of every ``o_proj`` and ``down_proj`` in one pass of the dense model, and cuts all at once."""
    channels, targets = job.channels, job.targets
    if not job.ratio:
        return Narrowed(job.subject, (), {}).made()
    scores: dict[str, Tensor] = {}
    means: dict[str, Tensor] = {}
    with job.walk(ids) as walk:
        for block in job.blocks(walk, "fluctuations"):
            own = [each for each in channels if each.block == block.index]
            moments = _moments(block, [targets[each.consumer] for each in own])
            for each in own:
                found = moments[each.consumer]
                weight_OI = weight_of(walk.skeleton, targets[each.consumer])
                scores[each.name] = group_scores(each, fluctuations(weight_OI, found.variance)).cpu()
                means[each.name] = found.mean.cpu()
    prices = {each.name: each.params_per_group(targets) for each in channels}
    cuttable = sum(prices[each.name] * each.num_groups for each in channels)
    groups = best_groups(channels, scores, prices, cuttable - job.ratio * job.num_params)
    biases = {
        each.consumer: _bias(job, each, groups[each.name], means[each.name])
        for each in channels
        if not bool(groups[each.name].all())
    }
    return Narrowed(job.subject, channels, groups, biases).made()


def _bias(job: Job, channels: Channels, groups: Tensor, mean_I: Tensor) -> Tensor:
    """``W_:P mean_P``: what the removed features gave on average."""
    name = channels.consumer
    weight_OI = job.targets[name].stacked([job.subject.weights.get(f"{name}.weight")]).double()
    removed_I = torch.ones(len(mean_I), dtype=torch.bool)
    removed_I[channels.kept(name, groups)] = False
    return weight_OI[:, removed_I] @ mean_I[removed_I]


def _moments(block: Block, targets: Sequence[Target]) -> dict[str, Moments]:
    """Runs a block; moments of the inputs of some linears."""
    moments = {target.name: Moments() for target in targets}

    def on(name: str):
        linear = block.walk.skeleton.get_submodule(name)
        return linear.register_forward_pre_hook(
            lambda _, args, kwargs: moments[name].add(first_argument(args, kwargs)), with_kwargs=True
        )

    handles = [on(name) for name in moments]
    try:
        block.run()
    finally:
        for handle in handles:
            handle.remove()
    return moments


FLAP = Method(
    name="flap",
    summary="heads and neurons that fluctuate least, with biases for their mean",
    source="FLAP, arXiv 2312.11983",
    samples=1024,
    seqlen=2048,
    check=lambda job: job.require_channels(job.channels),
    prune=prune,
)
