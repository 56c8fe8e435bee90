"""The output folder of a run and the work folder beside it: what may be touched, and whether there is room."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from svdllm.checkpoint import is_checkpoint
from svdllm.errors import InputError, ResourceError
from svdllm.memory import available_bytes
from svdllm.plan import Plan

# Left free on the disk beyond what the plan says.
DISK_RESERVE = 64 * 2**20
MARKER = ".svdllm-run"


def require_empty(output_dir: Path) -> None:
    """Raises InputError if there is anything at the place of the output."""
    if output_dir.is_file():
        raise InputError(f"{output_dir} is a file; the output is a folder. Choose another path.")
    if output_dir.is_dir() and any(output_dir.iterdir()):
        what = "a finished checkpoint" if holds_checkpoints(output_dir) else "a folder with other things in it"
        raise InputError(
            f"{output_dir} exists and is {what}; nothing is overwritten. Choose another path, or remove it first."
        )


def named_folder(path: str | Path) -> Path:
    """The path, if a folder beside it can be given another name.

    Raises:
        InputError: it is the current folder, one above it, or the root.
    """
    place = Path(path).absolute()
    if place.resolve() in (Path.cwd(), *Path.cwd().parents) or place.name == "..":
        raise InputError(f"{path} is the folder you are in, or one above it: name a folder to make, such as ./out.")
    return Path(path)


def place_for(output_dir: str | Path, what: str) -> Path:
    """The path of an output that is written at once, with ``new_folder``; ``what`` writes it: an export, a slice, ...

    Raises:
        InputError: something is there, or at the place where it is written.
    """
    place = named_folder(output_dir)
    require_empty(place)
    if (partial := _partial(place)).exists():
        raise InputError(f"{partial} is in the way, perhaps of {what} that was killed. Remove it first.")
    return place


@contextmanager
def new_folder(output_dir: Path) -> Iterator[Path]:
    """A folder to write into, which gets the name ``output_dir`` when everything is in it, and goes if anything fails."""
    partial = _partial(output_dir)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(output_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _partial(output_dir: Path) -> Path:
    return output_dir.with_name(f"{output_dir.name}.writing")


def is_work_folder(work: Path) -> bool:
    """Whether a run made this folder: it has our marker (or nothing at all in it)."""
    return work.is_dir() and ((work / MARKER).is_file() or not any(work.iterdir()))


def require_ours(work: Path) -> None:
    """Raises InputError if something that no run made is at the place of a work folder."""
    if work.exists() and not is_work_folder(work):
        raise InputError(
            f"{work} is in the way: it is not the work folder of a run. Move it away, or choose another output."
        )


def claim_work_folder(work: Path) -> None:
    """Makes the work folder, the marker first."""
    work.mkdir(parents=True, exist_ok=True)
    (work / MARKER).touch()


def start_over(work: Path) -> None:
    """Removes what an earlier run computed; blocks without settings could be anybody's."""
    for name in ("finished", "finished.writing", "analysis"):
        shutil.rmtree(work / name, ignore_errors=True)


def holds_checkpoints(folder: Path) -> bool:
    """A checkpoint, or a folder with one for each ratio."""
    return is_checkpoint(folder) or (folder.is_dir() and any(map(is_checkpoint, folder.glob("ratio-*"))))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def require_writable(output_dir: Path) -> Path:
    """The folder, of those above the output, that exists; raises InputError if nothing can be made in it."""
    existing = output_dir.absolute().parent
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK):
        raise InputError(f"{output_dir} cannot be made: {existing} is not writable. Choose an output elsewhere.")
    return existing


def require_room(output_dir: Path, work: Path, plan: Plan) -> None:
    """Raises ResourceError unless disk and memory suffice for what the plan predicts."""
    existing = require_writable(output_dir)
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
            f"The run needs {more / 1e9:.2f} GB more memory at its peak (stage {stage!r}), {memory / 1e9:.2f} GB are free.",
            f"Lower --{'probe-share' if stage == 'probe' else 'batch-tokens'}, or free some memory.",
        )
