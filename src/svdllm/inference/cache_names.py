"""Finds the key-value cache by its name in transformers: ``past_key_values`` up to 5.23, then ``cache``."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

CACHE_NAMES = ("cache", "past_key_values")  # models with code of their own keep the older one


def cache_name(module: nn.Module) -> str:
    """The name of the argument of ``module.forward`` that is a cache; the newest name if it takes none."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[0])


def cache_of(output: Any) -> Any:
    """The cache in the output of a model, or None."""
    return next((getattr(output, name) for name in CACHE_NAMES if hasattr(output, name)), None)
