"""The options of plan and compress, and the recipe that is made of them."""

from __future__ import annotations

from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from svdllm.cli.generated import options_of, read_flags, refuse_idle
from svdllm.cli.options import option

if TYPE_CHECKING:
    from svdllm.compression.recipe import Recipe

LIMIT = "--hidden-states-limit"

Preset = Annotated[
    str | None,
    option("Settings to start from: paper (SVD-LLM as published), balanced, or best (slower).", "Recipe", "balanced"),
]
RecipeFile = Annotated[
    Path | None,
    option(
        "YAML file of settings, such as the svdllm/recipe.yaml of a checkpoint; flags override it.",
        "Recipe",
        False,
        "--recipe",
    ),
]
HiddenStatesLimit = Annotated[
    str | None,
    option("Hidden states beyond this amount, as in 8GB, go to disk.", "Machine", "half of the free memory"),
]


def recipe_options() -> list[Parameter]:
    """An option for every setting of a recipe."""
    from svdllm.compression.recipe import Recipe

    return options_of(Recipe)


def build_recipe(preset: str | None, recipe_file: Path | None, flags: dict[str, Any]) -> Recipe:
    """Preset, then recipe file, then flags; a budget on the command line takes the place of the file's.

    Raises:
        InputError: a setting is wrong, does nothing here, or no budget is given.
    """
    from svdllm.checkpoint.quantized import NVFP4_GROUP
    from svdllm.compression.recipe import Recipe
    from svdllm.compression.recipe_files import load_settings, make_recipe, preset_settings
    from svdllm.compression.recipe_parts import BUDGETS, OF_A_BUDGET

    settings = {} if preset is None else preset_settings(preset)
    if recipe_file is not None:
        settings |= load_settings(recipe_file)
    given = read_flags(Recipe, flags)
    if isinstance(given.get("allocation"), dict):
        given["ranks"] = given.pop("allocation")
        settings = {name: value for name, value in settings.items() if name not in ("allocation", "round_to")}
    if any(name in given for name in BUDGETS):
        settings = {name: value for name, value in settings.items() if name not in (*BUDGETS, *OF_A_BUDGET)}
    if given.get("factor_bits") == 4 and settings.get("round_to", NVFP4_GROUP) % NVFP4_GROUP:
        settings["round_to"] = NVFP4_GROUP
    recipe = make_recipe(settings | given, origin=f"Recipe {recipe_file}" if recipe_file else "The options")
    refuse_idle(recipe, given, Recipe.rows_that_read)
    recipe.require_budget()
    return recipe
