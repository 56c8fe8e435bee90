"""Several processes that share a run, connected by torch.distributed: gloo between CPUs, nccl between GPUs."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from svdllm.common import errors
from svdllm.common.device import device_name, resolve_device
from svdllm.common.errors import EndedError, InputError, SvdllmError, as_ours, explaining
from svdllm.common.processes import ALONE, Processes, num_local_processes, num_processes

# A process may compute or write for long while the others wait: one that is killed is noticed by its closed connection.
LONGEST_STAGE = timedelta(days=30)
# For the other processes, when one has stopped: to stop too and clean up, or to tell why.
PATIENCE, NOTICE = 60.0, 5.0
FOLDER_SECONDS = 2.0  # until a file that was just written is seen on another host
# Keys in the store.
ERROR, LEFT = "svdllm error", "svdllm first process left"


@contextmanager
def connected(device: str) -> Iterator[Processes]:
    """Connects the processes of torchrun or accelerate launch while the context lasts; otherwise yields ``ALONE``.

    An error of one process ends the context in all of them with an error of the same class. ``told`` says of each
    error whether another process reports it.

    Args:
        device: the recipe's. Of several GPUs, each process takes the one of its local rank.

    Raises:
        InputError: the processes cannot reach each other, or have devices of different kinds or too few GPUs.
    """
    if num_processes() == 1:
        yield ALONE
        return
    is_ours = not dist.is_initialized()
    if is_ours:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        with explaining("The processes cannot reach each other", "start them by torchrun or accelerate launch"):
            dist.init_process_group(backend, timeout=LONGEST_STAGE)
    processes = ConnectedProcesses()
    try:
        processes.take_device(device)
        yield processes
        processes.wait()
    except Exception as error:
        processes.stopped(error)
        if processes.error is None:
            raise
        raise processes.error from error
    finally:
        processes.leave()
        if is_ours and dist.is_initialized():
            dist.destroy_process_group()


class ConnectedProcesses(Processes):
    """This process among those of the default group of torch.distributed."""

    def __init__(self) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.error: SvdllmError | None = None  # which ends the run; None for one that nobody expected here
        self._store: Any = _get_default_store()
        self._has_stopped = False

    def take_device(self, name: str) -> None:
        """Makes the GPU of the local rank the current one; see ``connected``."""
        device = resolve_device(name)
        kind = device.type
        if kind == "cuda":
            local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if device.index is not None:
                raise InputError(f"--device {name}: each of {self.count} processes takes a GPU; give --device cuda.")
            if local >= gpus:
                raise InputError(
                    f"{num_local_processes()} processes on this host, which has {gpus} GPUs: one for each."
                )
            torch.cuda.set_device(local)
            kind = device_name(torch.device("cuda", local))
        kinds = self.gather(kind)
        if len(set(kinds)) > 1:
            named = ", ".join(f"process {rank} on {kind}" for rank, kind in enumerate(kinds))
            raise InputError(
                f"The processes have devices of different kinds, which round differently ({named}): give --device cpu, "
                "or start them on GPUs of one kind."
            )

    def gather(self, data: Any) -> list[Any]:
        own = torch.frombuffer(bytearray(json.dumps(data).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.count)]
        with self._together():
            dist.all_gather(sizes, torch.tensor([len(own)]))
        lengths = [int(size) for size in sizes]
        padded = torch.nn.functional.pad(own, (0, max(lengths) - len(own)))
        contents = [torch.empty_like(padded) for _ in range(self.count)]
        with self._together():
            dist.all_gather(contents, padded)
        pairs = zip(contents, lengths, strict=True)
        return [json.loads(content[:length].numpy().tobytes()) for content, length in pairs]

    def in_turn(self, tensor: Tensor) -> Iterator[Tensor]:
        pieces = [torch.empty_like(tensor) for _ in range(self.count)]
        with self._together():
            dist.all_gather(pieces, tensor)
        yield from pieces

    def merged(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        own = [(name, leaf, tensor) for name, leaves in tensors.items() for leaf, tensor in leaves.items()]
        described = self.gather(
            [[name, leaf, list(t.shape), str(t.dtype).removeprefix("torch."), t.device.type] for name, leaf, t in own]
        )
        merged: dict[str, dict[str, Tensor]] = {name: {} for name in tensors}
        for rank, entries in enumerate(described):
            for number, (name, leaf, shape, dtype, kind) in enumerate(entries):
                if rank == self.rank:
                    tensor = own[number][2].contiguous()
                else:
                    tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=kind)
                if tensor.numel():
                    with self._together():
                        dist.broadcast(tensor.view(-1).view(torch.uint8), src=rank)
                merged.setdefault(name, {})[leaf] = tensor
        return merged

    def require_shared(self, folder: Path) -> None:
        token = folder / self.from_first(lambda: f".{uuid.uuid4().hex}")
        if self.is_first:
            token.touch()
        self.wait()
        until = time.monotonic() + FOLDER_SECONDS
        while not token.is_file() and time.monotonic() < until:
            time.sleep(0.05)
        found = self.gather([token.is_file(), socket.gethostname()])
        if self.is_first:
            token.unlink()
        for rank, (is_there, host) in enumerate(found):
            if not is_there:
                raise InputError(
                    f"{folder} of process {rank} on {host} is not that of process 0 on {found[0][1]}: all processes of "
                    "a run need one folder. Choose an output on a disk that the hosts share."
                )

    def stopped(self, error: Exception) -> None:
        if self._has_stopped:
            return
        self._has_stopped = True
        ours = as_ours(error)
        own = {
            "rank": self.rank,
            "kind": type(ours).__name__,
            "message": str(ours or error),
            "seconds": NOTICE if isinstance(error, EndedError) else PATIENCE,
        }
        with suppress(RuntimeError):  # where the store has gone with its process
            first = json.loads(self._store.compare_set(ERROR, "", json.dumps(own)))
            told = first["rank"] != self.rank
            self.error = _error_of(first, told=told) if told or ours else None
            dist.destroy_process_group()  # which ends the waiting of the others
            self._store.set(_stopped(self.rank), "")
            others = [_stopped(rank) for rank in range(self.count) if rank != self.rank]
            self._appear(others if self.is_first else [LEFT], first["seconds"])

    def leave(self) -> None:
        """Lets the other processes go, which wait for the first one to clean up after an error."""
        if self._has_stopped and self.is_first:
            with suppress(RuntimeError):
                self._store.set(LEFT, "")

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Explains why an operation of all processes has failed: another process has stopped, and perhaps told why."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise self._reason() from error

    def _reason(self) -> SvdllmError:
        with suppress(RuntimeError):
            if self._appear([ERROR], NOTICE):
                return _error_of(json.loads(self._store.get(ERROR)), told=True)
        return EndedError(
            "Another process of this run has ended without a word, as it does when the system runs out of memory.",
            "Finished blocks are kept: the same command goes on with them, also with fewer processes.",
        )

    def _appear(self, keys: list[str], seconds: float) -> bool:
        """Waits until all keys are in the store; returns False after some seconds without."""
        until = time.monotonic() + seconds
        while not self._store.check(keys):
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True


def _stopped(rank: int) -> str:
    return f"svdllm process {rank} stopped"


def _error_of(record: Mapping[str, Any], *, told: bool) -> SvdllmError:
    """The error that a process has left in the store; ``told`` says whether another process reports it."""
    kind = getattr(errors, record["kind"], SvdllmError)  # the base for an error that nobody expected
    error = kind(record["message"])
    error.told = told
    return error
