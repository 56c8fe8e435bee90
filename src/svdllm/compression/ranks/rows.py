"""The rows of the table of allocations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from svdllm.compression.forms import FORMS
from svdllm.compression.forms.bits import group_size_of
from svdllm.compression.math.measures import Measure
from svdllm.compression.ranks.question import Allocation, Evidence, Least, Question
from svdllm.models.chosen import Chosen
from svdllm.models.structure import Target


@dataclass(frozen=True, kw_only=True)
class Probing:
    """The changes of single targets and MLPs that are measured before an allocation, and the measure.

    ``ranks(target, round_to, settings)`` are the ranks to try, ascending. ``widths(width, round_to, settings)`` are
    those to narrow an MLP of a width to; none by default. ``bits(bits, settings)`` are those, of the ones that may be
    used, that every target is rounded to.
    """

    measure: Measure
    ranks: Callable[[Target, int, Any], list[int]]
    widths: Callable[[int, int, Any], list[int]] = lambda width, round_to, settings: []
    bits: Callable[[list[int], Any], list[int]] = lambda bits, settings: []
    least_tokens: int = 0  # on fewer, chance has a part in what is measured, and a warning says so
    advice: str = ""  # what else to do then, from a comma on


def multiples(question: Question, settings: Any) -> Least:
    """Everything in its smallest form of size ``round_to`` or in fewest bits, where that is smaller than dense."""
    size, cost = question.round_to, question.unit.cost
    apart = [name for name in question.forms if not FORMS[name].of_mlps and FORMS[name].curve]
    least: dict[str, Chosen] = {}
    for target in question.priced:
        options = [
            Chosen(name, group_size_of(target) if FORMS[name].bits else size)
            for name in apart
            if (FORMS[name].sizes(target, size) if FORMS[name].bits else size in FORMS[name].sizes(target, size))
        ]
        cheapest = min(options, key=lambda chosen: cost(target, chosen), default=None)
        if cheapest is not None and cost(target, cheapest) < cost(target, None):
            least[target.name] = cheapest
    for name in question.forms:
        for targets in question.mlps.values() if FORMS[name].of_mlps else ():
            together = sum(cost(t, Chosen(name, size)) for t in targets)
            if size in FORMS[name].sizes(targets[0], size) and together < sum(
                cost(t, least.get(t.name)) for t in targets
            ):
                least |= {t.name: Chosen(name, size) for t in targets}
    forms = sorted({chosen.form for chosen in least.values() if FORMS[chosen.form].bits})
    return Least(least, ", ".join([str(size)] * (not forms) + forms))


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of ``ALLOCATIONS``: how a budget is spread over the targets.

    ``allocate(question, evidence, settings)`` chooses forms and sizes. ``settings`` is the recipe, which has the fields
    of the row's own ``settings``. ``least(question, settings)`` are the least sizes that it may choose. A row that may
    leave targets dense is asked only for a budget that its least sizes fit.
    """

    name: str
    summary: str
    source: str
    allocate: Callable[[Question, Evidence, Any], Allocation]
    least: Callable[[Question, Any], Least] = multiples
    budgets: tuple[str, ...] = ("ratio", "target_params", "target_size")  # the settings that it takes as its budget
    forms: tuple[str, ...] = ("pair",)  # that it uses if the recipe names none
    other_forms: tuple[str, ...] = ()  # that it can use as well
    needs_spectra: bool = True  # False where shapes are enough, and the ranks are known before the analysis
    leaves_dense: bool = True  # whether it may leave a target dense
    probing: Probing | None = None
    settings: type[BaseModel] = BaseModel

    @property
    def reads(self) -> frozenset[str]:
        """The settings that do nothing without this row, or another that reads them."""
        return frozenset(self.settings.model_fields)
