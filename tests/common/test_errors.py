"""The wall around libraries: what they throw becomes one sentence, and what is not theirs passes."""

from __future__ import annotations

import errno

import pytest
import torch

from svdllm.common.errors import CheckpointError, InputError, explaining


class PanicException(BaseException):
    """As pyo3 makes it of a panic: no Exception, known by its name."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Exception("first line\nsecond"), "first line"),
        (KeyError("tokens"), "KeyError: 'tokens'"),
        (RecursionError(), "RecursionError"),
        (OSError(errno.EACCES, "Permission denied"), "[Errno 13] Permission denied"),
        (PanicException("index out of bounds"), "index out of bounds"),
    ],
)
def test_what_a_library_throws_is_one_sentence(error: BaseException, said: str) -> None:
    with pytest.raises(InputError) as found, explaining("a.json, row 3: no text", "remove it"):
        raise error
    assert str(found.value) == f"a.json, row 3: no text ({said}): remove it"
    assert found.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("ours"),
        KeyboardInterrupt(),
        MemoryError(),
        torch.OutOfMemoryError("no memory"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_what_is_no_fault_of_the_input_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as found, explaining("a.json", "remove it"):
        raise error
    assert found.value is error
