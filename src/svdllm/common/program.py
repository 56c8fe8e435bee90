"""Tells whether this process is the command line, which imports what a command needs only when it is called."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path


def is_command_line() -> bool:
    """Whether Python was started as ``svdllm ...`` or ``python -m svdllm ...``; False in a program that imports it."""
    return Path(sys.argv[0] if sys.argv else "").stem == "svdllm" or ("-m", "svdllm") in pairwise(sys.orig_argv)
