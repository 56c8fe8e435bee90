"""Products of the inputs of experts in the dense and in the compressed stream.

Both streams route every token as the compressed one does, so that each expert sees the same tokens in both: those that
it will be handed in use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from svdllm.compression.collect import RoutingWeights
from svdllm.compression.math.totals import fold_each
from svdllm.compression.products import Products, Sums
from svdllm.models.experts import Routing
from svdllm.models.hidden_states import HiddenStates
from svdllm.models.loaded_weights import tensors_replaced
from svdllm.models.structure import Target
from svdllm.models.walk import Block

Read = dict[str, tuple[Tensor, Tensor]]  # target -> inputs and routing weights


def expert_products(block: Block, targets: Sequence[Target], replaced: Mapping[str, Tensor]) -> dict[str, Products]:
    """The products of every target over all batches of the two streams; none for an expert without a token.

    Args:
        targets: linears of the experts of one layer that read their inputs at the same time.
        replaced: parameters of the compressed stream, where they differ from the dense ones.
    """
    walk = block.walk
    assert walk.compressed is not None
    routing = Routing(block.module)
    sums: dict[str, Sums] = {}
    widths = {target.name: target.in_features for target in targets}
    for numbers in walk.text.rounds:
        for number in numbers:
            with tensors_replaced(walk.skeleton, replaced), routing.recorded():
                compressed = _read(block, targets, walk.compressed, number)
            with routing.replayed():
                dense = _read(block, targets, walk.hidden, number)
            for target in targets:
                if target.name in compressed:
                    inputs, weights_T = compressed[target.name]
                    sums.setdefault(target.name, Sums(target.in_features, walk.device)).add(
                        dense[target.name][0], inputs, weights_T=weights_T
                    )
        fold_each(sums, lambda name: Sums(widths[name], walk.device), walk.processes)
    return {name: sums.pop(name).value() for name in list(sums)}


def _read(block: Block, targets: Sequence[Target], states: HiddenStates, number: int) -> Read:
    read: Read = {}
    routed = RoutingWeights()

    def on(target: Target) -> Any:
        def note(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            weights_T = routed.of(target)
            assert weights_T is not None
            read[target.name] = args[0], weights_T

        return block.walk.skeleton.get_submodule(target.name).register_forward_pre_hook(note)

    handles = [on(target) for target in targets]
    try:
        with torch.no_grad(), routed.noted(block, targets):
            block.run_on(states, number)
    finally:
        for handle in handles:
            handle.remove()
    return read
