"""What can go wrong, told apart by who has to act. Every message says what, expected against found, and what to do."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class SvdllmError(Exception):
    """Base of every error that this library raises on purpose; ``exit_code`` is the command line's."""

    exit_code = 1


class InputError(SvdllmError, ValueError):
    """An argument, a file or a setting is wrong: the caller can mend it."""

    exit_code = 2


class UnsupportedModelError(SvdllmError):
    """The model is fine, but it is of a kind that cannot be compressed or loaded here."""

    exit_code = 3


class ResourceError(SvdllmError):
    """Memory or disk does not suffice; ``advice`` says what to do by the options of a command."""

    exit_code = 4

    def __init__(self, problem: str, advice: str = ""):
        super().__init__(f"{problem} {advice}".rstrip())
        self.problem, self.advice = problem, advice


class NumericalError(SvdllmError):
    """A NaN or an infinity, in weights, activations or logits; the message names where."""

    exit_code = 5


class CheckpointError(InputError):
    """A checkpoint is truncated, altered or incomplete; the message names the file."""


# Errors of the system that mean that a disk holds no more, and what to do about each.
FULL = {
    errno.ENOSPC: "Free some room on that disk.",
    errno.EDQUOT: "Free some of the room that your quota allows.",
    errno.EFBIG: "Raise the limit on the size of files (`ulimit -f`, or that of the file system).",
}


def as_ours(error: BaseException) -> SvdllmError | None:
    """What an error means to the user, if it is ours or of memory, disk or files; None where nobody expected it."""
    if isinstance(error, SvdllmError):
        return error
    import torch  # late: the help of the command line needs these classes, not torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return ResourceError(f"Out of memory: {first_line(error)}")
    if (found := os_error_in(error)) is not None:
        kind = ResourceError if found.errno in (*FULL, errno.ENOMEM) else InputError
        return kind(f"{found.strerror}: {found.filename or 'a file'}" if found.errno is not None else str(found))
    return None


def os_error_in(error: BaseException) -> OSError | None:
    """Returns the error of the system that an error is, or tells of.

    Libraries in Rust (safetensors, tokenizers) put it into the text of an error of their own: ``... (os error 28)``.
    torch.save does not tell which one it was; that is taken for a full disk.
    """
    if isinstance(error, SvdllmError):
        return None
    if isinstance(error, OSError):
        return error
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return OSError(int(found[1]), os.strerror(int(found[1])))
    if re.search(r"inline_container.*(unexpected pos|failed writing)", str(error)):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return None


@contextmanager
def explaining(what: str, advice: str = "") -> Iterator[None]:
    """Turns whatever a library throws at a damaged file or an odd row into one sentence: ``what (its words): advice``.

    Errors of ours, and memory or disk that runs out, pass as they are.

    Raises:
        InputError: in place of any other exception, and of a panic of a library in Rust.
    """
    try:
        yield
    except BaseException as error:
        # what pyo3 makes of a panic is no Exception, and has no name to import
        foreign = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not foreign or isinstance(as_ours(error), ResourceError) or isinstance(error, SvdllmError):
            raise
        raise InputError(f"{what} ({said_by(error)}){advice and f': {advice}'}") from error


def said_by(error: BaseException) -> str:
    """What an error of a library says, in one line; of a failed look-up also its type, since it says only the key."""
    words = first_line(error)
    return f"{type(error).__name__}: {words}" if isinstance(error, LookupError) else words


def first_line(error: BaseException) -> str:
    """The first line of what an error says, to be quoted in a message of ours; the next too where it ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def did_you_mean(name: str, known: Iterable[str], most: int = 1) -> str:
    """What to put behind a name that is not known: ``, did you mean 'a' or 'b'?``, or nothing where none is like it."""
    known, name = list(known), name.lower()
    like = difflib.get_close_matches(name, known, n=most) or [other for other in known if name and name in other][:most]
    return f", did you mean {' or '.join(map(repr, like))}?" if like else ""
