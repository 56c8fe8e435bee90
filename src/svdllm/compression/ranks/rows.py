"""The rows of the table of allocations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from svdllm.compression.math.measures import Measure
from svdllm.compression.ranks.question import Allocation, Evidence, Least, Question
from svdllm.models.structure import Target


@dataclass(frozen=True, kw_only=True)
class Probing:
    """The truncations of single targets that are measured before an allocation, and the measure.

    ``ranks(target, round_to, settings)`` are the ranks to try, ascending.
    """

    measure: Measure
    ranks: Callable[[Target, int, Any], list[int]]
    least_tokens: int = 0  # on fewer, chance has a part in what is measured, and a warning says so
    advice: str = ""  # what else to do then, from a comma on


def multiples(question: Question, settings: Any) -> Least:
    """``round_to`` for every target that is smaller by it; the others stay dense."""
    least, cost = question.round_to, question.unit.cost
    ranks = {t.name: least for t in question.targets if least <= t.break_even_rank and cost(t, least) < cost(t, None)}
    return Least(ranks, str(least))


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of ``ALLOCATIONS``: how a budget is spread over the targets.

    ``allocate(question, evidence, settings)`` chooses the ranks. ``settings`` is the recipe, which has the fields of
    the row's own ``settings``. A row that may leave targets dense is asked only for a budget that its least ranks fit.
    ``least(question, settings)`` are the least ranks that it may choose.
    """

    name: str
    summary: str
    source: str
    allocate: Callable[[Question, Evidence, Any], Allocation]
    least: Callable[[Question, Any], Least] = multiples
    budgets: tuple[str, ...] = ("ratio", "target_params", "target_size")  # the settings that it takes as its budget
    needs_spectra: bool = True  # False where shapes are enough, and the ranks are known before the analysis
    leaves_dense: bool = True  # whether it may leave a target dense
    probing: Probing | None = None
    settings: type[BaseModel] = BaseModel

    @property
    def reads(self) -> frozenset[str]:
        """The settings that do nothing without this row, or another that reads them."""
        return frozenset(self.settings.model_fields)
