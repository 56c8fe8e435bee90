"""The paper's sensitivity studies: one thing varies, all else stays (Figure 5, Tables 4, 5, 6 and 15)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from svdllm.common.errors import InputError, did_you_mean
from svdllm.comparison.compressed import Compressed, Trained
from svdllm.comparison.variant import Variant
from svdllm.comparison.variants import variants_of
from svdllm.compression.recipe_files import make_recipe
from svdllm.recovery.sequential_lora import ORDERS

METHOD = "svd-llm"


@dataclass(frozen=True, kw_only=True)
class Request:
    """The request for a study: its values, and what all its models have in common.

    Args:
        method: as ``svdllm compare`` takes it; None for svd-llm.
        calibration: settings of all recipes.
        recover: settings of all training; None if nothing is trained.
        teacher: the dense model.
    """

    values: Sequence[str]
    method: str | None
    calibration: Mapping[str, Any]
    recover: Mapping[str, Any] | None
    teacher: str


@dataclass(frozen=True, kw_only=True)
class Study(ABC):
    """A row of the table of studies: the thing that varies, and its default values."""

    summary: str
    axis: str
    values: tuple[str, ...]
    numeric: bool = False

    @abstractmethod
    def variants(self, name: str, request: Request) -> tuple[Variant, ...]:
        """One variant for each value. Raises InputError if the request does not fit the study."""


@dataclass(frozen=True, kw_only=True)
class SettingStudy(Study):
    """Varies a setting of the recipe."""

    setting: str

    def variants(self, name: str, request: Request) -> tuple[Variant, ...]:
        if request.recover is not None:
            raise InputError(f"Study {name} trains nothing: leave --recover out.")
        if self.setting in request.calibration:
            raise InputError(f"Study {name} varies {self.setting}: give its --values, and not the setting itself.")
        (base,) = variants_of([request.method or METHOD], request.calibration, teacher=request.teacher)
        if not isinstance(base, Compressed):
            raise InputError(f"A study varies a setting of a recipe, and {base.name} is not made by one.")
        return tuple(self._variant(base, name, value) for value in request.values)

    def _variant(self, base: Compressed, name: str, value: str) -> Compressed:
        named = f"{name} {value}" if self.numeric else value
        settings = {**base.recipe.to_dict(), self.setting: _number(value, name) if self.numeric else value}
        return Compressed(name=named, recipe=make_recipe(settings, f"{self.setting} {value}"))


class PartsStudy(Study):
    """Compares methods, which are its values."""

    def variants(self, name: str, request: Request) -> tuple[Variant, ...]:
        if request.method is not None:
            raise InputError(f"Study {name} compares methods: give them as --values, and no --method.")
        return variants_of(request.values, request.calibration, request.recover, teacher=request.teacher)


class OrderStudy(Study):
    """Varies the order of the sequential update."""

    def variants(self, name: str, request: Request) -> tuple[Variant, ...]:
        if unknown := [value for value in request.values if value not in ORDERS]:
            raise InputError(f"Unknown order {unknown[0]!r}; known are {', '.join(ORDERS)}.")
        if request.recover is not None and "order" in request.recover:
            raise InputError(f"Study {name} varies the order: leave it out of --recover, and give --values.")
        method = f"{request.method or METHOD}+sequential-lora"
        variants = []
        for order in request.values:
            recover = None if request.recover is None else {**request.recover, "order": order}
            (variant,) = variants_of([method], request.calibration, recover, teacher=request.teacher)
            assert isinstance(variant, Trained)
            variants.append(replace(variant, name=f"{variant.base.name}+{order}"))
        return tuple(variants)


STUDIES: dict[str, Study] = {
    "samples": SettingStudy(
        setting="samples",
        summary="number of calibration windows (Figure 5, Table 6)",
        axis="calibration windows",
        values=("16", "32", "64", "128", "256"),
        numeric=True,
    ),
    "seed": SettingStudy(
        setting="seed",
        summary="seed by which the calibration windows are drawn (Figure 5, Table 6)",
        axis="seed",
        values=("1", "2", "3", "4", "5"),
        numeric=True,
    ),
    "data": SettingStudy(
        setting="calibration",
        summary="calibration text (Table 6)",
        axis="calibration text",
        values=("wikitext2", "c4"),
    ),
    "parts": PartsStudy(
        summary="whitening alone, update alone, both, beside ASVD (Table 4)",
        axis="method",
        values=("asvd", "svd-llm", "svd+sequential-lora", "svd-llm+sequential-lora"),
    ),
    "order": OrderStudy(
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
    request = Request(
        values=values or chosen.values, method=method, calibration=calibration, recover=recover, teacher=teacher
    )
    return chosen.variants(name, request)


def _number(value: str, name: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise InputError(f"Study {name}: {value!r} is not a whole number.") from None
