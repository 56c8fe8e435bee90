"""Runs one function in several connected processes, as torchrun would."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

# Its processes start with the library imported.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["svdllm", "runs"])


def _child(function: Callable[..., Any], args: tuple[Any, ...], rank: int, count: int, port: int, results: Any) -> None:
    import torch

    torch.set_num_threads(1)
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        results.put((rank, function(*args)))
    except Exception as error:
        if not hasattr(error, "told"):
            traceback.print_exc()
        results.put((rank, (type(error).__name__, str(error), getattr(error, "told", None))))


def together(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What every process returns; of an error, its class, its text and whether another process tells it.

    None for a process that was killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = FORKS.SimpleQueue()
    processes = [
        FORKS.Process(target=_child, args=(function, args, rank, count, port, results)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found: dict[int, Any] = {}
    while not results.empty():
        rank, result = results.get()
        found[rank] = result
    return [found.get(rank) for rank in range(count)]
