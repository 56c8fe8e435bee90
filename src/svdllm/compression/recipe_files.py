"""Recipes from outside: files, presets, and mappings of settings."""

from __future__ import annotations

import re
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from svdllm.common.errors import InputError
from svdllm.common.settings import problems_of
from svdllm.compression.ranks import ALLOCATIONS
from svdllm.compression.recipe import Recipe

PRESETS = ("paper", "balanced", "best")


def make_recipe(settings: dict[str, Any], origin: str = "the settings") -> Recipe:
    """Validates a mapping into a recipe; every problem is reported at once as an InputError."""
    try:
        return Recipe(**settings)
    except ValidationError as error:
        raise InputError(f"{origin}: {problems_of(error)}") from error


def load_settings(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) recipe file.

    Raises:
        InputError: no such file, or not a mapping.
    """
    path = Path(path)
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"Recipe {path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise InputError(f"Recipe {path}: expected a mapping of settings, found {type(settings).__name__}.")
    return settings


def allocation_file(path: str | Path) -> dict[str, int | str]:
    """Explicit ranks from a JSON or YAML file: linear (a regular expression) -> rank, ``full`` or ``dense``.

    Raises:
        InputError: no allocation has this name and no file either, or the file is no such map.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"--allocation {str(path)!r} is neither one of {', '.join(ALLOCATIONS)} nor a file. A file is a JSON or "
            "YAML map from linear to rank, like {'mlp.down_proj': 200, 'q_proj': dense}."
        )
    ranks = load_settings(path)
    wrong = [
        f"{name}: {rank!r}" for name, rank in ranks.items() if rank not in ("full", "dense") and not _is_rank(rank)
    ]
    if wrong or not ranks:
        raise InputError(
            f"Allocation {path}: expected a map from linear to a rank above zero, 'full' or 'dense', found "
            f"{'; '.join(wrong[:5]) or 'nothing'}."
        )
    return {str(name): rank for name, rank in ranks.items()}


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def preset_settings(name: str) -> dict[str, Any]:
    """The settings of a preset, from the YAML file in the package."""
    if name not in PRESETS:
        raise InputError(f"Unknown preset {name!r}; known are {', '.join(PRESETS)}.")
    text = (resources.files("svdllm.compression") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def parse_amount(text: str, *, what: str, bytes_allowed: bool) -> int:
    """``100M`` or ``1.5B`` parameters, ``300MB`` or ``2GiB`` bytes, as an integer."""
    units = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
    if bytes_allowed:
        units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
        units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    amount = 0 if match is None else int(Decimal(match[1]) * units.get(match[2].upper(), 0))
    if amount <= 0:
        examples = "300MB, 1.5GB or 2GiB" if bytes_allowed else "100M or 1.5B"
        raise InputError(f"{what} {text!r} is not an amount above zero; write it like {examples}.")
    return amount
