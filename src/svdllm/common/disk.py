"""Measures free disk space, allocates files at once, and explains a full disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from svdllm.common.errors import FULL, ResourceError, os_error_in

# Errors of posix_fallocate where the system does not support it.
NOT_OFFERED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
ZEROS = bytes(2**20)


def existing_above(path: Path) -> Path:
    """Returns the path itself if it exists, otherwise the nearest folder above it."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Returns the free bytes of the disk that a path is on, or will be."""
    return shutil.disk_usage(existing_above(path)).free


def allocate(file: Path, num_bytes: int) -> None:
    """Makes a file of a size and reserves all its blocks, so that writing to a mapping of it cannot fail.

    Raises:
        OSError: the disk is full. The file is removed.
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
    """Reserves the blocks of an open file; returns False where the system has no call for this."""
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
    """Adds the file's name to a system error without one, also if a library has wrapped the error."""
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
    """Turns every error of a full disk into a ResourceError, which ends with ``what_is_left``."""
    try:
        yield
    except Exception as error:
        found = os_error_in(error)
        if found is None or found.errno not in FULL:
            raise
        where = f"{found.strerror}: {found.filename or folder}."
        raise ResourceError(f"{where} {FULL[found.errno]} {what_is_left}".rstrip()) from error
