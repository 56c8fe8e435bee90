"""The key-value cache by the name that transformers gives it: ``past_key_values`` up to 5.23, ``cache`` from 5.24 on."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

CACHE_NAMES = ("cache", "past_key_values")  # models with code of their own keep the older one


def cache_name(module: nn.Module) -> str:
    """Name of the argument with which ``module.forward`` takes a cache; the newest if it takes none."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[0])


def cache_of(output: Any) -> Any:
    """The cache in what a model returns, or None."""
    return next((getattr(output, name) for name in CACHE_NAMES if hasattr(output, name)), None)
