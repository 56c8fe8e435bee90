"""Room on disks: how much there is, how a file takes its share at once, and what is said when there is no more."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from svdllm.common.errors import FULL, ResourceError, os_error_in

# What posix_fallocate ends with where it is not offered.
NOT_OFFERED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
ZEROS = bytes(2**20)


def existing_above(path: Path) -> Path:
    """Returns the path itself if something is there, otherwise the nearest folder above it."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Returns the free bytes of the disk that a path is on, or will be."""
    return shutil.disk_usage(existing_above(path)).free


def allocate(file: Path, num_bytes: int) -> None:
    """Makes a file of this size whose blocks are all taken, so that writing to a mapping of it cannot fail.

    Raises:
        OSError: the disk has no room for it. The file is removed.
    """
    try:
        with file.open("wb", buffering=0) as opened, naming(file):
            if not _fallocate(opened.fileno(), num_bytes):
                for start in range(0, num_bytes, len(ZEROS)):
                    opened.write(ZEROS[: num_bytes - start])
    except OSError:
        file.unlink(missing_ok=True)
        raise


def _fallocate(handle: int, num_bytes: int) -> bool:
    """Returns False where the system or the file system has no such call."""
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(handle, 0, num_bytes)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
        return False
    return True


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Adds the file's name to an error of the system that lacks one, also to one that a library wraps."""
    try:
        yield
    except Exception as error:
        if (found := os_error_in(error)) is None:
            raise
        if found.filename is None and found.errno is not None:
            found.filename = str(file)
        if found is error:
            raise
        raise found from error


@contextmanager
def explain_full_disk(folder: Path, what_is_left: str) -> Iterator[None]:
    """Turns every way in which a disk runs full while ``folder`` is written to into a ResourceError."""
    try:
        yield
    except Exception as error:
        found = os_error_in(error)
        if found is None or found.errno not in FULL:
            raise
        where = f"{found.strerror}: {found.filename or folder}."
        raise ResourceError(f"{where} {FULL[found.errno]} {what_is_left}".rstrip()) from error
