"""Guards the folder of a result until it is complete: what may be overwritten, by which run, and whether it fits."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from svdllm.checkpoint.report import holds_checkpoints
from svdllm.common.disk import existing_above, explain_full_disk, free_bytes
from svdllm.common.errors import InputError, ResourceError
from svdllm.common.locks import locked

# Left free on the disk beyond what is predicted.
DISK_RESERVE = 64 * 2**20
MARKER = ".svdllm-run"
# Names in a folder that cannot be replaced, or that stays from run to run.
LOCK, PARTIAL, WRITING = "svdllm.lock", "svdllm.partial", "svdllm.writing"
# A file system keeps this in its topmost folder.
OF_THE_DISK = "lost+found"
# Without these a folder is neither a model nor a checkpoint, so they are moved last.
LAST = ("config.json", "svdllm")
# In a work folder: the result, and the mark that it is complete and only has to be moved.
FINISHED, COMPLETE = "finished", "complete"
# In a work folder: patterns of files that no later run uses.
SCRATCH = ("finished.writing", "hidden-states*", "inputs")


@dataclass(frozen=True)
class Output:
    """The folder of a result, which appears when the result is complete.

    Until then everything is written beside it, so that it appears in one step. Where that is not possible (the folder
    is a mount point, or its parent is not writable), everything is written inside it, and moves up at the end.

    path: as the caller gave it.
    folder: the path, or the target if it is a link.
    """

    path: Path
    folder: Path
    inside: bool

    @classmethod
    def at(cls, path: str | Path) -> Output:
        """Makes the output at a path. Raises InputError if no new folder can be made there."""
        folder = followed(named_folder(path))
        alone = folder.is_dir() and not os.access(folder.absolute().parent, os.W_OK)
        return cls(Path(path), folder, inside=is_mount(folder) or alone or (folder / PARTIAL).is_dir())

    @property
    def work(self) -> Path:
        """The folder that an unfinished run leaves for the next one."""
        return self._place(PARTIAL)

    @property
    def writing(self) -> Path:
        """The folder of a result that is written without a work folder."""
        return self._place(WRITING)

    def _place(self, name: str) -> Path:
        """A place in the folder, such as ``<folder>/svdllm.partial``, or beside it, such as ``<folder>.partial``."""
        return self.folder / name if self.inside else self.folder.with_name(f"{self.folder.name}{Path(name).suffix}")

    def require_free(self, *known: str) -> None:
        """Raises InputError if the output exists, or cannot be made.

        ``known`` names files that may be in a folder that cannot be replaced.
        """
        if self.folder.is_file():
            raise InputError(f"{self.path} is a file; the output is a folder. Choose another path.")
        if self.folder.is_dir() and not is_empty(self.folder, *(known if self.inside else ())):
            what = "a finished checkpoint" if holds_checkpoints(self.folder) else "a folder with other things in it"
            raise InputError(
                f"{self.path} exists and is {what}; nothing is overwritten. Choose another path, or remove it first."
            )
        require_writable(self.folder if self.inside else self.folder.absolute().parent, self.path)

    @contextmanager
    def taken(self) -> Iterator[str | None]:
        """Locks the output while the context lasts; yields a warning if another run may still write to it.

        Raises:
            InputError: another run is writing to it.
        """
        if not self.work.exists():
            self.require_free(LOCK, WRITING)
        with locked(self._place(LOCK), self.path) as warning:
            yield warning

    def require_disk(self, num_bytes: int, needs: str, there: int = 0) -> None:
        """Raises ResourceError unless the disk has room for ``num_bytes``, of which ``there`` exist already."""
        free = free_bytes(self.work) + there
        if num_bytes + DISK_RESERVE > free:
            raise ResourceError(
                f"The disk of {self.path} has {free / 1e9:.2f} GB free, {needs} {num_bytes / 1e9:.2f} GB. Free some, "
                "or choose an output elsewhere."
            )

    def complete(self) -> None:
        """Moves the finished result to its place, and removes the work folder.

        If the run is killed meanwhile, the next run completes it.
        """
        (self.work / COMPLETE).touch()
        self.finish_completing()

    def finish_completing(self) -> None:
        """Completes a run that was killed in ``complete``, if there is one."""
        if not (self.work / COMPLETE).is_file():
            return
        if (self.work / FINISHED).is_dir():
            self.appear(self.work / FINISHED)
        for entry in self.work.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
        shutil.rmtree(self.work)

    def appear(self, made: Path) -> None:
        """Moves a complete folder to the place of the output.

        Where this takes several steps, config and report come last: a part without them is not taken for a checkpoint.
        """
        if not self.inside:
            made.replace(self.folder)
            return
        for entry in sorted(made.iterdir(), key=lambda entry: (entry.name in LAST, entry.name)):
            entry.replace(self.folder / entry.name)
        made.rmdir()


@contextmanager
def new_folder(path: str | Path, what: str) -> Iterator[tuple[Output, Path]]:
    """Yields an output, and the folder to write it into.

    The output appears when the context ends; after an error, nothing is left.

    ``what`` names the kind of run in messages, such as "an export".

    Raises:
        InputError: the output exists, or another run is writing to it.
        ResourceError: the disk is full.
    """
    output = Output.at(path)
    with output.taken():
        if output.writing.exists():
            raise InputError(f"{output.writing} is in the way, perhaps of {what} that was killed. Remove it first.")
        output.require_free(LOCK)
        with explain_full_disk(output.path, "Nothing was left behind."):
            output.writing.mkdir()
            try:
                yield output, output.writing
                output.appear(output.writing)
            except BaseException:
                shutil.rmtree(output.writing, ignore_errors=True)
                raise


def named_folder(path: str | Path) -> Path:
    """Returns the path of an output, if it can be made.

    Raises:
        InputError: it is the current folder, a folder above it, or a link that leads nowhere.
    """
    place = Path(path).absolute()
    try:
        resolved = place.resolve()
    except (RuntimeError, OSError) as error:
        raise InputError(f"{path} is a link that leads nowhere ({error}). Choose another path.") from error
    if resolved in (Path.cwd(), *Path.cwd().parents) or place.name == "..":
        raise InputError(f"{path} is the folder you are in, or one above it: name a folder to make, such as ./out.")
    return Path(path)


def followed(path: Path) -> Path:
    """Returns the target of a link, which need not exist; any other path as it is."""
    return path.resolve() if path.is_symlink() else path


def is_mount(folder: Path) -> bool:
    """Whether another disk, or another folder of the same disk, is mounted there."""
    if os.path.ismount(folder):
        return True
    table = Path("/proc/self/mountinfo")  # the only source for another folder of the same disk
    if not table.is_file():
        return False
    name = "".join(f"\\{ord(letter):03o}" if letter in " \t\n\\" else letter for letter in os.path.realpath(folder))
    return any(line.split()[4] == os.fsencode(name) for line in table.read_bytes().splitlines())


def is_empty(folder: Path, *known: str) -> bool:
    """Whether a folder has nothing in it but the ``known`` names and what its file system keeps there."""
    of_the_disk = (OF_THE_DISK,) if is_mount(folder) else ()
    return all(entry.name in (*known, *of_the_disk) for entry in folder.iterdir())


def is_work_folder(work: Path) -> bool:
    """Whether a run made this folder: it has our marker, or is empty."""
    return work.is_dir() and ((work / MARKER).is_file() or not any(work.iterdir()))


def require_ours(work: Path) -> None:
    """Raises InputError if a file or folder that no run made is in the place of a work folder."""
    if work.exists() and not is_work_folder(work):
        raise InputError(
            f"{work} is in the way: it is not the work folder of a run. Move it away, or choose another output."
        )


def claim_work_folder(work: Path) -> None:
    """Makes a work folder with the marker in it."""
    work.mkdir(parents=True, exist_ok=True)
    (work / MARKER).touch()


def start_over(work: Path) -> None:
    """Removes what an earlier run computed."""
    for name in (FINISHED, "finished.writing", "analysis"):
        shutil.rmtree(work / name, ignore_errors=True)


def remove_scratch(work: Path) -> None:
    """Removes the files in a work folder that no later run uses."""
    for path in [path for pattern in SCRATCH for path in work.glob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def require_writable(place: Path, output: Path | None = None) -> None:
    """Raises InputError if nothing can be made at a place: the nearest folder above it is not writable."""
    existing = existing_above(place)
    why = "is a file" if not existing.is_dir() else "is not writable" if not os.access(existing, os.W_OK) else None
    if why is not None:
        raise InputError(f"{output or place} cannot be made: {existing} {why}. Choose an output elsewhere.")


def require_free_output(path: str | Path) -> None:
    """Raises InputError if a run could not write to this output; an unfinished run is not in the way."""
    output = Output.at(path)
    require_ours(output.work)
    output.require_free(LOCK, PARTIAL, WRITING)


def require_new(place: Path) -> None:
    """Raises InputError if the output, a file or a folder, exists or cannot be made."""
    if place.is_file() or (place.is_dir() and not is_empty(place)):
        raise InputError(f"{place} exists; nothing is overwritten. Choose another output, or remove it first.")
    if place.is_dir() and place.suffix.lower() == ".json":
        raise InputError(f"{place} is a folder, and its name is a file's. Choose another output.")
    require_writable(place)
