"""Names of methods, as ``svdllm compare`` takes them, and the recipes they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svdllm.common.errors import InputError, did_you_mean
from svdllm.comparison.settings import DENSE, Variant
from svdllm.compression.recipe_files import PRESETS, load_settings, make_recipe, preset_settings
from svdllm.compression.recipe_parts import BUDGETS, OF_A_BUDGET
from svdllm.recovery import Recovery, make_recovery
from svdllm.recovery.settings import DEFAULTS as TRAINING

# The published methods with the ranks they are published with; presets by their names.
METHOD_NAMES: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd"},
    "fwsvd": {"method": "fwsvd"},
    "asvd": {"method": "asvd"},
    "asvd-strs": {"method": "asvd", "allocation": "strs"},
    "svd-llm": preset_settings("paper"),
    **{name: preset_settings(name) for name in PRESETS if name != "paper"},
}
BASELINES = ("svd", "fwsvd", "asvd", "asvd-strs")  # which the paper compares itself with


def variants_of(
    names: Sequence[str], calibration: Mapping[str, Any], recover: Mapping[str, Any] | None = None, *, teacher: str
) -> tuple[Variant, ...]:
    """The variants by name.

    A name is one of ``METHOD_NAMES`` or a recipe file, and ``NAME+TRAINING`` is the same model trained afterwards, as in
    ``svd-llm+sequential-lora`` or ``balanced+blockwise+distill``. ``calibration`` are settings of all recipes,
    ``recover`` those of all training, in which ``teacher`` is the dense model, and the device that of the recipe, unless
    they say otherwise.

    Raises:
        InputError: a name is not known, given twice, or its settings make no sense; names it.
    """
    variants = tuple(_variant(name, calibration, recover, teacher) for name in names)
    for variant in variants:
        if [other.name for other in variants].count(variant.name) > 1:
            raise InputError(f"Method {variant.name!r} is given twice.")
    if recover is not None and all(variant.recovery is None for variant in variants):
        raise InputError(
            "Training settings are given, but no method is trained: write it like svd-llm+sequential-lora among the methods."
        )
    return variants


def _variant(name: str, calibration: Mapping[str, Any], recover: Mapping[str, Any] | None, teacher: str) -> Variant:
    base, *training = name.split("+")
    if base in METHOD_NAMES:
        settings = METHOD_NAMES[base]
    elif Path(base).suffix in (".yaml", ".yml", ".json"):
        settings = load_settings(base)
        base = Path(base).stem
        if base in (*METHOD_NAMES, DENSE):
            raise InputError(f"Recipe {name} would be called {base}, which is another method: rename the file.")
        settings = {
            key: value for key, value in settings.items() if key == "ranks" or key not in (*BUDGETS, *OF_A_BUDGET)
        }
        if settings.get("ranks") is not None:
            raise InputError(f"Recipe {name} has explicit ranks, which have no ratio: leave them out.")
    else:
        raise InputError(_unknown(name, base, [*METHOD_NAMES, *TRAINING]))
    recipe = make_recipe({**settings, **calibration}, f"method {name}")
    recovery = _recovery(name, training, recover, teacher, recipe.device)
    return Variant(name="+".join([base, *training]), recipe=recipe, recovery=recovery)


def _recovery(
    name: str, training: list[str], recover: Mapping[str, Any] | None, teacher: str, device: str
) -> Recovery | None:
    if not training:
        return None
    if unknown := [method for method in training if method not in TRAINING]:
        raise InputError(_unknown(name, unknown[0], list(TRAINING)))
    if recover is None or "data" not in recover:
        raise InputError(f"Method {name} needs what to learn from: --recover 'data: alpaca.json', or another source.")
    if "methods" in recover:
        raise InputError("--recover: methods are written behind the method, as in svd-llm+sequential-lora.")
    taught = {"teacher": teacher} if {"distill", "blockwise"} & set(training) else {}
    return make_recovery({"device": device, **taught, **recover, "methods": tuple(training)})


def _unknown(name: str, part: str, known: list[str]) -> str:
    return (
        f"Unknown method {name!r}{did_you_mean(part, known) or '.'} Known are {', '.join(METHOD_NAMES)}, a recipe file "
        f"(.yaml), and each of these with +{', +'.join(TRAINING)} behind it."
    )
