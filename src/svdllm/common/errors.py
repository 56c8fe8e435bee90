"""Errors by who has to act. Every message says what is wrong, what was expected and found, and what to do."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class SvdllmError(Exception):
    """Base of every error that svdllm raises on purpose; the command line exits with ``exit_code``."""

    exit_code = 1
    told: bool | None = None  # whether another process reports it; None where that is not known


class InputError(SvdllmError, ValueError):
    """An argument, a file or a setting is wrong, and the caller can correct it."""

    exit_code = 2


class UnsupportedModelError(SvdllmError):
    """The model is intact, but of a kind that svdllm cannot compress or load."""

    exit_code = 3


class ResourceError(SvdllmError):
    """Memory or disk does not suffice; ``advice`` names options of a command that help."""

    exit_code = 4

    def __init__(self, problem: str, advice: str = ""):
        super().__init__(f"{problem} {advice}".rstrip())
        self.problem, self.advice = problem, advice


class EndedError(ResourceError):
    """Another process of the run has ended, and told nobody why."""


class NumericalError(SvdllmError):
    """Weights, activations or logits have a NaN or an infinity; the message says where."""

    exit_code = 5


class CheckpointError(InputError):
    """A checkpoint is truncated, altered or incomplete; the message names the file."""


# System errors of a full disk, and what to do about each.
FULL = {
    errno.ENOSPC: "Free some room on that disk.",
    errno.EDQUOT: "Free some of the room that your quota allows.",
    errno.EFBIG: "Raise the limit on the size of files (`ulimit -f`, or that of the file system).",
}


def as_ours(error: BaseException) -> SvdllmError | None:
    """Turns an error of memory, disk or files into ours; None for an error that nobody expected."""
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
    """Returns the system error that an error is, or has in its text; None if there is none.

    Libraries in Rust (safetensors, tokenizers) quote it in the text of their own error: ``... (os error 28)``.
    torch.save does not say which it was; a full disk is assumed.
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
    """Turns an error of a library over a damaged file or an odd row into one sentence: ``what (its words): advice``.

    Our own errors, and those of full memory or disks, pass unchanged.

    Raises:
        InputError: instead of any other exception, and of a panic of a library in Rust.
    """
    try:
        yield
    except BaseException as error:
        # a panic in Rust is not an Exception here, and its class cannot be imported
        foreign = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not foreign or isinstance(as_ours(error), ResourceError) or isinstance(error, SvdllmError):
            raise
        raise InputError(f"{what} ({said_by(error)}){advice and f': {advice}'}") from error


def said_by(error: BaseException) -> str:
    """Quotes an error of a library in one line; with its type for a failed look-up, which says only the key."""
    words = first_line(error)
    return f"{type(error).__name__}: {words}" if isinstance(error, LookupError) else words


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for messages of ours; with the next line where it ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def did_you_mean(name: str, known: Iterable[str], most: int = 1) -> str:
    """The end of a message on an unknown name: ``, did you mean 'a' or 'b'?``, or "" where no name is similar."""
    known, name = list(known), name.lower()
    like = difflib.get_close_matches(name, known, n=most) or [other for other in known if name and name in other][:most]
    return f", did you mean {' or '.join(map(repr, like))}?" if like else ""
