"""Checks for packages that only some commands need."""

from __future__ import annotations

import importlib.util

from svdllm.common.errors import InputError


def require_extra(package: str, needed_for: str, extra: str = "data", instead: str = "") -> None:
    """Raises InputError unless ``package``, which an extra of svdllm installs, can be imported.

    Args:
        instead: ends the message: what can be done without the package.
    """
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{needed_for} needs the package '{package}': pip install 'svdllm[{extra}]'{instead}")
