"""The processes of torchrun or accelerate launch: where each computes, and when they wait."""

from __future__ import annotations

import os

import torch

from svdllm.common.device import resolve_device
from svdllm.common.errors import InputError
from svdllm.common.processes import num_processes


def own_device(name: str) -> torch.device:
    """The device of this process: of several GPUs, the one of its local rank.

    Raises:
        InputError: no such device, or not the first GPU.
    """
    device = resolve_device(name)
    if device.type != "cuda":
        return device
    if num_processes() == 1:
        if device.index:
            raise InputError(
                f"--device {name}: training takes the first GPU that it sees; set CUDA_VISIBLE_DEVICES={device.index} "
                "and give --device cuda."
            )
        return device
    index = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def meet(device: torch.device) -> None:
    """Connects the processes, so that they can wait for each other from now on."""
    if num_processes() > 1:
        from accelerate import PartialState

        PartialState(cpu=device.type == "cpu")


def wait_for_all() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
