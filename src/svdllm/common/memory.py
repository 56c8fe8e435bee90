"""Measures memory: what is free, what the process uses, and what weights take."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from svdllm.common.errors import ResourceError, first_line


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of the parameters of a model in memory; tied ones are counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def skeleton_bytes(skeleton: PreTrainedModel) -> int:
    """Bytes that the parameters of a skeleton take once they are loaded in its dtype; tied ones are counted once."""
    skeleton.tie_weights()
    return parameter_bytes(skeleton)


def resident_bytes() -> int:
    """Resident memory of this process now; its peak where the system does not report the current value."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_bytes()


def peak_bytes() -> int:
    """Highest resident memory of this process so far; 0 where the system does not report it."""
    status = Path("/proc/self/status")
    if status.is_file() and (match := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(match[1]) * 1024  # getrusage would count what the parent had when it forked
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back_freed() -> None:
    """Returns memory that was freed to the system: glibc keeps pieces of it, which would count beside what follows."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def forget_peaks(device: torch.device) -> bool:
    """Lets ``peak_bytes`` and ``device_peak_bytes`` begin anew; False where the system cannot."""
    if device.type == "cuda" and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM
    except OSError:
        return False
    return True


def available_bytes() -> int | None:
    """Memory that is free without swapping, within a container's limit; None where the system does not report it."""
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        if match:
            found.append(int(match[1]) * 1024)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        # Cached file pages count as used there, though they are given up when memory is asked for.
        cached = re.search(r"^inactive_file (\d+)$", (used.parent / "memory.stat").read_text(), re.MULTILINE)
        found.append(max(0, int(limit.read_text()) - int(used.read_text()) + int(cached[1] if cached else 0)))
    return min(found) if found else None


def device_peak_bytes(device: torch.device) -> int:
    """Highest memory of a GPU since the process began; 0 for the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


@contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Turns every out-of-memory error, also of torch's CPU allocator, into a ResourceError with advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and "allocate memory" not in str(error):
            raise
        said = first_line(error)[:200]
        raise ResourceError(f"Out of memory ({said}).", advice) from error


def free_bytes_on(device: torch.device) -> int | None:
    """Free memory of an accelerator, or ``available_bytes`` for the CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()


def require_memory(num_bytes: int, needs: str, device: torch.device, advice: str = "") -> None:
    """Raises ResourceError unless so much memory is free; ``needs`` begins the message, as in "the weights need"."""
    free = free_bytes_on(device)
    if free is not None and num_bytes > free:
        raise ResourceError(
            f"{needs} {num_bytes / 1e9:.2f} GB of memory, {free / 1e9:.2f} GB are free on {device}.", advice
        )
