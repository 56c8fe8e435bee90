"""Recipes from outside: files, presets, and mappings of settings."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from svdllm.common.errors import InputError
from svdllm.common.settings import problems_of
from svdllm.compression.forms import FORMS
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
        InputError: the file does not exist, or is not a mapping.
    """
    path = Path(path)
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"Recipe {path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise InputError(f"Recipe {path}: expected a mapping of settings, found {type(settings).__name__}.")
    return settings


def settings_of_copy(file: Path) -> tuple[str, dict[str, Any]]:
    """The settings of a checkpoint that is made of another: their YAML, and the mapping for its report.

    The files that smaller sizes are sliced from do not go with it. The settings of a pruned model are no recipe.

    Raises:
        InputError: the file cannot be read.
    """
    settings = load_settings(file)
    if "pruning" in settings:
        return file.read_text(encoding="utf-8"), settings
    recipe = make_recipe(settings | {"elastic": False})
    return recipe.to_yaml(), recipe.to_dict()


def allocation_file(path: str | Path) -> dict[str, Any]:
    """Explicit forms from a JSON or YAML file: a regular expression -> rank, ``full``, ``dense`` or ``{form: size}``.

    Raises:
        InputError: neither an allocation nor a file has this name, or the file is not such a map.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"--allocation {str(path)!r} is neither one of {', '.join(ALLOCATIONS)} nor a file. A file is a JSON or "
            "YAML map from linear to rank or form, like {'mlp.down_proj': 200, 'o_proj': {packed: 96}, q_proj: dense}."
        )
    ranks = load_settings(path)
    wrong = [f"{name}: {rank!r}" for name, rank in ranks.items() if not _is_form(rank)]
    if wrong or not ranks:
        raise InputError(
            f"Allocation {path}: expected a map from linear to a rank above zero, 'full', 'dense' or a form with its "
            f"size, found {'; '.join(wrong[:5]) or 'nothing'}."
        )
    return {str(name): rank for name, rank in ranks.items()}


def _is_form(value: Any) -> bool:
    if isinstance(value, dict):
        return len(value) == 1 and all(name in FORMS and _is_rank(size) for name, size in value.items())
    return value in ("full", "dense") or _is_rank(value)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def preset_settings(name: str) -> dict[str, Any]:
    """The settings of a preset, from the YAML file in the package."""
    if name not in PRESETS:
        raise InputError(f"Unknown preset {name!r}; known are {', '.join(PRESETS)}.")
    text = (resources.files("svdllm.compression") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)
