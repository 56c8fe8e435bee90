"""The processes of torchrun or accelerate launch: which one writes, and where they wait for each other."""

from __future__ import annotations

import os

import torch


def is_main() -> bool:
    """Of all processes, the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_all() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
