"""Decides which targets have the pullback of their left metric in place of the metric itself."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel

from svdllm.compression.forms import bits_in
from svdllm.compression.recipe import Recipe
from svdllm.models.structure import Target


def stream_width(skeleton: PreTrainedModel) -> int:
    """Features of the hidden states between blocks, as the embedding makes them."""
    return int(skeleton.get_input_embeddings().weight.shape[-1])  # type: ignore[union-attr, index]


def is_pulled_back(target: Target, recipe: Recipe, stream: int) -> bool:
    """Whether ``W^T G W`` is summed for a target, and not ``G``: where that is smaller and suffices.

    It suffices where every fit is the weight times something. Rounding is not, nor is the fit of a sequential
    calibration to what the residual stream lacks. The consumer of an MLP has ``G`` for its narrowing too. Experts
    share ``G`` with the others of their layer, whose weights are different.

    Args:
        stream: features of the residual stream, to which the outputs of a target of as many may be added.
    """
    left = recipe.left_metric
    if left is None or left.pullback is None or bits_in(recipe.analysed_forms):
        return False
    smaller = len(target.linears) * target.in_features**2 < target.out_features**2
    consumes = target.inner is not None and target.inner.side == "in"
    return smaller and target.pool is None and not consumes and target.out_features != stream


def pulled_back(targets: Iterable[Target], recipe: Recipe, skeleton: PreTrainedModel) -> set[str]:
    """The names of those targets that ``is_pulled_back`` says."""
    stream = stream_width(skeleton)
    return {target.name for target in targets if is_pulled_back(target, recipe, stream)}
