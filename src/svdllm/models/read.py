"""Reads what a module of a loaded block is called with."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor, nn

from svdllm.common.errors import UnsupportedModelError
from svdllm.models.added import Added, Followed, Read
from svdllm.models.hidden_states import HiddenStates
from svdllm.models.hooks import first_argument
from svdllm.models.walk import Block


def read(block: Block, module: nn.Module, states: HiddenStates, number: int, *, advance: bool = False) -> Read:
    """What a module of a block reads for a batch of a stream, and what its output is added to.

    The block is run no further than that takes, unless the stream is to ``advance`` through it.

    Raises:
        UnsupportedModelError: the block does not call the module.
        NumericalError: a hidden state is NaN or infinite, where the stream advances.
    """
    inputs: list[Tensor] = []
    added = Added(ends_run=not advance)
    before = module.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append(first_argument(args, kwargs)), with_kwargs=True
    )
    after = module.register_forward_hook(lambda _module, _args, output: added.follow(output))
    try:
        with suppress(Followed), torch.no_grad(), added:
            ran = block.run_on(states, number)
    finally:
        before.remove()
        after.remove()
    if not inputs:
        raise UnsupportedModelError(f"{block.name} ran without calling one of its linears, which it called before.")
    if advance:
        block.keep(states, number, ran)
    return Read(inputs[0], added.total)
