"""Finds the order in which a block calls its targets."""

from __future__ import annotations

import torch

from svdllm.models.structure import Target
from svdllm.models.walk import Block


def stages_of(block: Block) -> list[list[Target]]:
    """The targets of a block in the order in which the model calls them: by group, those of experts by pool.

    It is the order in the first batch of the text, also where other processes have that batch.
    """
    walk = block.walk
    targets = {target.name: target for target in walk.structure.block_targets(block.index)}
    called: dict[str, None] = {}

    def note(name: str):
        return lambda *_: called.setdefault(name)

    handles = [
        walk.skeleton.get_submodule(target.linears[0]).register_forward_pre_hook(note(target.name))
        for target in targets.values()
    ]
    with torch.no_grad():
        block.run_on(walk.hidden, 0)
    for handle in handles:
        handle.remove()
    order = walk.processes.from_first(lambda: list(called))
    stages: dict[str, list[Target]] = {}
    for name in order:
        stages.setdefault(targets[name].pool or targets[name].group, []).append(targets[name])
    for target in targets.values():  # experts that no token of the batch was routed to
        if target.pool in stages and target.name not in order:
            stages[target.pool].append(target)
    return list(stages.values())
