"""Chooses the device and the dtype of a computation."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

from svdllm.common.errors import InputError

DTYPES = ("float32", "bfloat16", "float16", "float64")


def resolve_device(name: str) -> torch.device:
    """Finds a device by name; ``auto`` is the first GPU, else the CPU.

    Raises:
        InputError: the device does not exist here, or has no float64.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "," in name:
        raise InputError(
            f"--device {name}: a process computes on one device. For several, start one process for each: torchrun "
            f"--nproc-per-node {name.count(',') + 1} -m svdllm compress ... --device cuda."
        )
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        available = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise InputError(f"--device {name!r} is not available here; there is {', '.join(available)}.") from error
    if device.type in ("meta", "mps"):
        raise InputError(f"--device {name!r} has no float64, which decompositions need; use cpu or cuda.")
    return device


def device_name(device: torch.device) -> str:
    """Names the GPU or the processor, as its maker does."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def resolve_dtype(name: str, device: torch.device, source_dtype: torch.dtype) -> torch.dtype:
    """Finds a dtype by name; ``auto`` is float32 on a CPU, where half precision is slow, else the source's dtype."""
    if name != "auto":
        if name not in DTYPES:
            raise InputError(f"--dtype {name!r} is unknown; use auto, {', '.join(DTYPES)}.")
        return getattr(torch, name)
    if source_dtype == torch.float64:
        return torch.float64
    return torch.float32 if device.type == "cpu" else source_dtype
