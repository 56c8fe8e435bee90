"""Locks of output folders: only one run at a time writes into each."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from svdllm.common.errors import InputError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

# Errors of a file system that has no locks.
NOT_OFFERED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)

SINCE = "%Y-%m-%d %H:%M:%S"
Holder = dict[str, str | int]  # process, host, since; empty where a file does not tell


@contextmanager
def locked(file: Path, what: Path) -> Iterator[str | None]:
    """Holds the lock of ``what`` while the context lasts; ``file`` is removed at its end, with folders made for it.

    The kernel holds the lock (``flock``) and releases it when the process ends, however it ends. The file that a killed
    process leaves locks nothing. Its content says who holds the lock. On a file system without locks, the content is
    the lock: a process of this host that has ended does not hold it, and a process of another host is believed to run.

    Yields:
        A warning if a run on another host left the file and did not end; otherwise None.

    Raises:
        InputError: another run holds the lock; names its process.
    """
    made = [folder for folder in (file.parent, *file.parent.parents) if not folder.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        while (taken := _attempt(file, what)) is None:
            pass
        handle, earlier = taken
        try:
            yield _warning(what, earlier)
        finally:
            _release(file, handle)
    finally:
        with suppress(OSError):  # there is something in it
            for folder in made:
                folder.rmdir()


def _attempt(file: Path, what: Path) -> tuple[int, Holder] | None:
    """Tries to take a lock once; returns the open file and its earlier holder, or None if another attempt is needed."""
    try:
        handle, is_new = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        try:
            handle, is_new = os.open(file, os.O_RDWR), False
        except FileNotFoundError:
            return None
    holder = _holder(handle)
    try:
        by_kernel = _flock(handle)
        if not by_kernel and not is_new:
            if not _has_ended(holder):
                raise InputError(_refusal(file, what, holder, certain=False))
            file.unlink(missing_ok=True)
        if _is_at(handle, file):
            _write(handle, {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime(SINCE)})
            return handle, holder
    except BlockingIOError as error:
        os.close(handle)
        raise InputError(_refusal(file, what, holder, certain=_is_here(holder))) from error
    except BaseException:
        os.close(handle)
        if is_new:
            file.unlink(missing_ok=True)
        raise
    os.close(handle)
    return None


def _flock(handle: int) -> bool:
    """Takes the kernel's lock; returns False where it has none.

    Raises:
        BlockingIOError: another process has it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EACCES:  # how some network file systems say that it is taken
            raise BlockingIOError from error
        if error.errno not in NOT_OFFERED:
            raise
        return False
    return True


def _release(file: Path, handle: int) -> None:
    """Removes the file first, so that nobody takes the lock of a file that is about to go."""
    if fcntl is None:
        os.close(handle)  # Windows removes no open file
        file.unlink(missing_ok=True)
    else:
        file.unlink(missing_ok=True)
        os.close(handle)


def _is_at(handle: int, file: Path) -> bool:
    """Whether the open file is still the file at this path."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _holder(handle: int) -> Holder:
    os.lseek(handle, 0, os.SEEK_SET)
    try:
        return dict(json.loads(os.read(handle, 1000)))
    except (ValueError, TypeError):
        return {}


def _write(handle: int, holder: Holder) -> None:
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, json.dumps(holder).encode())


def _has_ended(holder: Holder) -> bool:
    """Whether the holder is a process of this host that has ended."""
    if holder.get("host") != socket.gethostname() or os.name == "nt":
        return False
    try:
        os.kill(int(holder.get("process", 0)), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is another user's
        pass
    return False


def _refusal(file: Path, what: Path, holder: Holder, *, certain: bool) -> str:
    who = f" ({_name(holder)})" if holder else ""
    doubt = "" if certain else f" If that run has ended, remove {file}."
    return f"Another run{who} is writing to {what}. Wait for it, stop it, or choose another output.{doubt}"


def _warning(what: Path, holder: Holder) -> str | None:
    if _is_here(holder):
        return None
    return (
        f"An earlier run ({_name(holder)}) was stopped while it wrote to {what}; this one goes on. Stop one of the two "
        "if it is still running: not every network file system shows the locks of another host."
    )


def _is_here(holder: Holder) -> bool:
    return holder.get("host") in (None, socket.gethostname())


def _name(holder: Holder) -> str:
    return f"process {holder.get('process')} on {holder.get('host')} since {holder.get('since')}"
