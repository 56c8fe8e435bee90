"""The output folder of a run and the work folder beside it: what may be touched, and whether there is room."""

from __future__ import annotations

import shutil
from pathlib import Path

from svdllm.checkpoint import is_checkpoint
from svdllm.errors import InputError, ResourceError
from svdllm.memory import available_bytes
from svdllm.plan import Plan

# Left free on the disk beyond what the plan says.
DISK_RESERVE = 64 * 2**20


def require_empty(output_dir: Path) -> None:
    """Raises InputError if there is anything at the place of the output."""
    if output_dir.is_file():
        raise InputError(f"{output_dir} is a file; the output is a folder. Choose another path.")
    if output_dir.is_dir() and any(output_dir.iterdir()):
        what = "a finished checkpoint" if is_checkpoint(output_dir) else "a folder with other things in it"
        raise InputError(
            f"{output_dir} exists and is {what}; nothing is overwritten. Choose another path, or remove it first."
        )


def is_work_folder(work: Path) -> bool:
    """A work folder holds nothing but what a run puts there."""
    known = {"source", "analysis", "hidden-states", "finished", "finished.writing"}
    return work.is_dir() and {path.name for path in work.iterdir()} <= known


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def require_room(output_dir: Path, work: Path, plan: Plan) -> None:
    """Raises ResourceError unless disk and memory suffice for what the plan predicts."""
    existing = output_dir.absolute().parent
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free + size_of(work)
    if plan.disk_bytes + DISK_RESERVE > free:
        raise ResourceError(
            f"The disk of {output_dir} has {free / 1e9:.2f} GB free, the run needs {plan.disk_bytes / 1e9:.2f} GB "
            "(analysis and checkpoint). Free some, or choose an output elsewhere."
        )
    memory = available_bytes()
    more = plan.peak_ram_bytes - plan.ram_by_stage["now"]
    if memory is not None and more > memory:
        stage = max(plan.ram_by_stage, key=lambda name: plan.ram_by_stage[name])
        raise ResourceError(
            f"The run needs {more / 1e9:.2f} GB more memory at its peak (stage {stage!r}), {memory / 1e9:.2f} GB are free. "
            "Lower --batch-tokens, or free some memory."
        )
