"""Finds the branches of a block that add their output to the residual: the attention and the MLP.

They are children of the block with targets in them. Without all of them a block returns what it is given. Where it does
not, as with a norm behind the sum, no branch can be left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from svdllm.common.errors import UnsupportedModelError
from svdllm.models.experts import experts_tried
from svdllm.models.hooks import experts_computed
from svdllm.models.mlps import Arguments, BlockTrial, signature_of
from svdllm.models.structure import Structure
from svdllm.models.trial_pass import trial_pass


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A module of a block whose output is added to the residual.

    Args:
        num_outputs: outputs in a tuple that begins with the one that is added; 0 for a tensor.
        params: number of the targets' weights in it.
    """

    name: str
    block: int
    num_outputs: int
    params: int


def find_branches(skeleton: PreTrainedModel, structure: Structure) -> list[Branch]:
    """Finds the branches of all blocks, with one trial for blocks of equal modules and shapes.

    Raises:
        UnsupportedModelError: a block is more than its residual and branches; or as ``discover``.
    """
    arguments = trial_pass(skeleton, structure.blocks, {}).arguments
    known: dict[str, Mapping[str, int]] = {}
    branches = []
    for index, (name, given) in enumerate(zip(structure.blocks, arguments, strict=True)):
        block, targets = skeleton.get_submodule(name), structure.block_targets(index)
        children = dict.fromkeys(target.name.removeprefix(f"{name}.").split(".")[0] for target in targets)
        key = f"{signature_of(block)} {list(children)}"
        if key not in known:
            with experts_computed(skeleton, "eager"), experts_tried(skeleton):
                known[key] = _outputs_of(block, list(children), given, name)
        for child, num_outputs in known[key].items():
            params = sum(t.num_weights for t in targets if t.name.startswith(f"{name}.{child}."))
            if params:  # a linear that is a child of the block is not a branch of its own
                branches.append(Branch(name=f"{name}.{child}", block=index, num_outputs=num_outputs, params=params))
    return branches


def _outputs_of(block: nn.Module, children: list[str], given: Arguments, name: str) -> dict[str, int]:
    """Child -> number of its outputs. Raises UnsupportedModelError if the block is not the identity without them."""
    trial = BlockTrial(block, given)
    outputs: dict[str, int] = {}

    def on(child: str) -> Any:
        def return_zeros(module: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, tuple):
                outputs[child] = 0
                return torch.zeros_like(output)
            outputs[child] = len(output)
            return (torch.zeros_like(output[0]), *output[1:])

        return (trial.stubs.get(child) or block.get_submodule(child)).register_forward_hook(return_zeros)

    handles = [on(child) for child in children]
    try:
        results = trial.run()
    finally:
        for handle in handles:
            handle.remove()
    args, kwargs = trial.given
    hidden = args[0] if args else kwargs["hidden_states"]
    if results is None or results[0].shape != hidden.shape or not torch.allclose(results[0], hidden, atol=1e-5):
        raise UnsupportedModelError(
            f"{name} ({type(block).__name__}) does not return what it is given when its {' and '.join(children)} add "
            "nothing, as with a norm behind the sum: no branch of it can be left out. Use another method of pruning."
        )
    return outputs
