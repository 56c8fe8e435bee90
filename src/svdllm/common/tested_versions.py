"""The versions of transformers that the test suite has passed with: ``make test``, ``test-newest``, ``test-oldest``."""

from __future__ import annotations

import re
import warnings

import transformers

OLDEST, NEWEST = "5.16", "5.24"


def warn_if_untested() -> None:
    """Warns if transformers is newer than any tested version; Python shows the same warning once."""
    found = transformers.__version__
    if _release(found) > _release(NEWEST):
        major, minor = _release(NEWEST)
        warnings.warn(
            f"transformers {found} is newer than any that this version of svdllm was tested with ({OLDEST} to "
            f"{NEWEST}). If something fails, take a newer svdllm or: pip install 'transformers<{major}.{minor + 1}'",
            stacklevel=3,  # where svdllm is imported
        )


def _release(version: str) -> tuple[int, int]:
    major, minor = map(int, re.findall(r"\d+", version)[:2])
    return major, minor
