"""A process of a test: one step of training all U with FSDP2 if there are several, merged and written by the first.

torchrun --nproc-per-node 2 sharded_step.py CHECKPOINT OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard

from svdllm import load_model
from svdllm.common.processes import is_first, num_processes
from svdllm.recovery import make_recovery, sequential_lora, training
from svdllm.recovery.distributed import meet
from svdllm.recovery.record import TrainingRecord
from svdllm.recovery.stage import Task


def one_step(model: Any, task: Task) -> Any:
    """In place of the Trainer, which has FSDP on GPUs only."""
    if num_processes() > 1:
        for block in model.get_submodule("base_model.model.model.layers"):
            fully_shard(block)
        fully_shard(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(2):  # the first step moves one of the two adapter matrices only
        ids = torch.stack([ids for ids, _ in task.rows])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert training.is_sharded(model) == (num_processes() > 1)
    record = TrainingRecord(stage=task.title, steps=2, tokens=ids.numel(), seconds=0.0, trained_params=0, losses=[])
    return record, training.whole_tensors(model)


def main(checkpoint: str, out: str) -> None:
    meet(torch.device("cpu"))
    rows = [(ids, ids) for ids in torch.arange(64).view(4, 16)]
    settings = make_recovery({"data": "python-docs"})
    task = Task(
        file="step",
        title="step",
        rows=rows,
        settings=settings,
        schedule=settings.schedule("sequential-lora"),
        folder=Path(out).parent,
    )
    _, changed = sequential_lora.train_factors(
        lambda: load_model(checkpoint, dtype=torch.float32).requires_grad_(False), ("svd_u",), task
    )
    if is_first():
        save_file({name: tensor.contiguous() for name, tensor in changed.items()}, out)


if __name__ == "__main__":
    training.train = one_step
    main(*sys.argv[1:])
