"""The paper's sensitivity studies: one thing varies, all else stays (Figure 5, Tables 4, 5, 6 and 15)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from svdllm.common.errors import InputError, did_you_mean
from svdllm.comparison.compressed import Compressed, Trained
from svdllm.comparison.variant import Variant
from svdllm.comparison.variants import variants_of
from svdllm.compression.recipe_files import make_recipe
from svdllm.recovery.sequential_lora import ORDERS


@dataclass(frozen=True, kw_only=True)
class Study:
    """What varies, over which values by default, and which setting of the recipe it is, if it is one."""

    summary: str
    axis: str
    values: tuple[str, ...]
    setting: str | None = None
    numeric: bool = False


STUDIES = {
    "samples": Study(
        summary="number of calibration windows (Figure 5, Table 6)",
        axis="calibration windows",
        values=("16", "32", "64", "128", "256"),
        setting="samples",
        numeric=True,
    ),
    "seed": Study(
        summary="seed by which the calibration windows are drawn (Figure 5, Table 6)",
        axis="seed",
        values=("1", "2", "3", "4", "5"),
        setting="seed",
        numeric=True,
    ),
    "data": Study(
        summary="calibration text (Table 6)",
        axis="calibration text",
        values=("wikitext2", "c4"),
        setting="calibration",
    ),
    "parts": Study(
        summary="whitening alone, update alone, both, beside ASVD (Table 4)",
        axis="method",
        values=("asvd", "svd-llm", "svd+sequential-lora", "svd-llm+sequential-lora"),
    ),
    "order": Study(
        summary="order of the sequential update, and both factors at once (Tables 5 and 15)",
        axis="order of the update",
        values=tuple(ORDERS),
    ),
}


def find_study(name: str) -> Study:
    """Raises InputError if there is no study of that name."""
    if name not in STUDIES:
        raise InputError(f"Unknown study {name!r}{did_you_mean(name, STUDIES) or '.'} Known are {', '.join(STUDIES)}.")
    return STUDIES[name]


def study(
    name: str,
    values: Sequence[str],
    method: str | None,
    calibration: Mapping[str, Any],
    recover: Mapping[str, Any] | None,
    *,
    teacher: str,
) -> tuple[Variant, ...]:
    """The variants of a study: ``method`` (svd-llm) with each of the values, or with the study's own.

    Raises:
        InputError: no such study, or a value is not one of it.
    """
    chosen = find_study(name)
    values = values or chosen.values
    if name == "parts":
        if method is not None:
            raise InputError("Study parts compares methods: give them as --values, and no --method.")
        return variants_of(values, calibration, recover, teacher=teacher)
    method = method or "svd-llm"
    if name == "order":
        return _orders(values, method, calibration, recover, teacher)
    if recover is not None:
        raise InputError(f"Study {name} trains nothing: leave --recover out.")
    if chosen.setting in calibration:
        raise InputError(f"Study {name} varies {chosen.setting}: give its --values, and not the setting itself.")
    (base,) = variants_of([method], calibration, teacher=teacher)
    if chosen.setting == "calibration":
        return tuple(_with(base, "calibration", value, value) for value in values)
    return tuple(_with(base, chosen.setting or name, _number(value, name), f"{name} {value}") for value in values)


def _orders(
    values: Sequence[str],
    method: str,
    calibration: Mapping[str, Any],
    recover: Mapping[str, Any] | None,
    teacher: str,
) -> tuple[Variant, ...]:
    if unknown := [value for value in values if value not in ORDERS]:
        raise InputError(f"Unknown order {unknown[0]!r}; known are {', '.join(ORDERS)}.")
    if recover is not None and "order" in recover:
        raise InputError("Study order varies the order: leave it out of --recover, and give --values.")
    variants = []
    for order in values:
        settings = None if recover is None else {**recover, "order": order}
        (variant,) = variants_of([f"{method}+sequential-lora"], calibration, settings, teacher=teacher)
        assert isinstance(variant, Trained)
        variants.append(replace(variant, name=f"{variant.base.name}+{order}"))
    return tuple(variants)


def _with(base: Variant, setting: str, value: Any, name: str) -> Compressed:
    if not isinstance(base, Compressed):
        raise InputError(f"A study varies a setting of a recipe, and {base.name} is not made by one.")
    recipe = make_recipe({**base.recipe.to_dict(), setting: value}, f"{setting} {value}")
    return Compressed(name=name, recipe=recipe)


def _number(value: str, name: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise InputError(f"Study {name}: {value!r} is not a whole number.") from None
