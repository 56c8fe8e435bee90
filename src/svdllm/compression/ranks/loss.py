"""Forms of least loss: how changing each linear or MLP alone changes the predictions, and a knapsack over all forms.

The loss of a unit at size ``r`` is ``c tail(r) / tail(r0)``: its curve of errors gives the shape, one probe at ``r0``
the height. Linears may stay dense, at no loss and full price. An MLP is narrowed as a whole, or its linears are chosen
apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from svdllm.compression.forms import FORMS, Form
from svdllm.compression.math.linalg import tail_energies
from svdllm.compression.math.measures import divergence
from svdllm.compression.ranks.knapsack import Choice, Solution, Unit, solve
from svdllm.compression.ranks.probe_settings import ProbeSettings
from svdllm.compression.ranks.question import Allocation, Evidence, Question
from svdllm.compression.ranks.rows import Probing, Row
from svdllm.compression.ranks.uniform import uniform_rank
from svdllm.models.chosen import Chosen
from svdllm.models.structure import Target

# What a probe removes of the parameters: enough for its divergence to be above the noise of a few tokens. Alone, the
# linears of an attention change the predictions less than those of an MLP.
PROBED_RATIO, PROBED_RATIO_OF_MLPS = 0.7, 0.4
PROBED_SHARE_OF_WIDTH = 0.35

Losses = Mapping[str, Tensor]  # target or MLP -> predicted loss at every size (nats per token)


def probe_rank(target: Target) -> int:
    """The one rank at which a target is probed: what a ratio leaves, packed."""
    ratio = PROBED_RATIO if target.inner is None else PROBED_RATIO_OF_MLPS
    return max(1, uniform_rank(target, ratio, forms=("packed", "pair")))


def probe_width(width: int) -> int:
    """The one width to which an MLP is narrowed on trial."""
    return max(1, round(PROBED_SHARE_OF_WIDTH * width))


def predicted_losses(tails: Tensor, size: int, divergence: float) -> Tensor:
    """Loss at every size (float64), by one divergence (nats per token) measured at ``size``.

    Args:
        tails: squared error at every size, falling to 0 at the full one.
    """
    return tails * (max(divergence, 0.0) / float(tails[size])) if tails[size] > 0 else tails * 0


def losses_of(evidence: Evidence, question: Question) -> dict[str, Tensor]:
    """The predicted losses of all targets and MLPs of a question, by their probes."""
    tails = {t.name: tail_energies(evidence.energies[t.name]) for t in question.targets}
    if any(FORMS[name].of_mlps for name in question.forms):
        tails |= {name: evidence.narrowings[name] for name in question.mlps}
    losses = {}
    for name, tail in tails.items():
        ((size, measured),) = evidence.probes[name].items()
        losses[name] = predicted_losses(tail, size, measured)
    return losses


def _apart(target: Target, losses: Tensor, question: Question, evidence: Evidence) -> list[Choice[Chosen | None]]:
    """The choices of a linear by itself: its sizes in every form, and dense."""
    cost, dense = question.unit.cost, question.unit.cost(target, None)
    held = None if evidence.held is None else evidence.held.get(target.name, Chosen("pair", 0))
    options = [
        Chosen(form.name, size)
        for form in _forms(question, of_mlps=False)
        for size in form.sizes(target, question.round_to)
        if held is None or size <= held.size
    ]
    choices: list[Choice[Chosen | None]] = [] if target.name in evidence.not_dense else [Choice(None, dense, 0.0)]
    return choices + [Choice(chosen, cost(target, chosen), float(losses[chosen.size])) for chosen in options]


def _together(targets: Sequence[Target], losses: Tensor, question: Question) -> list[Choice[Chosen | None]]:
    """The choices of an MLP as a whole."""
    return [
        Choice(chosen, sum(question.unit.cost(t, chosen) for t in targets), float(losses[chosen.size]))
        for form in _forms(question, of_mlps=True)
        for size in form.sizes(targets[0], question.round_to)
        for chosen in [Chosen(form.name, size)]
    ]


def _forms(question: Question, *, of_mlps: bool) -> list[Form]:
    return [FORMS[name] for name in question.forms if FORMS[name].of_mlps == of_mlps and FORMS[name].curve]


def units_of(question: Question, losses: Losses, evidence: Evidence) -> list[Unit[Chosen | None]]:
    """The units of the knapsack: linears, and MLPs that may be narrowed or whose linears are chosen apart."""
    units: list[Unit[Chosen | None]] = []
    taken: set[str] = set()
    for name, targets in question.mlps.items():
        if name in losses and (narrower := _together(targets, losses[name], question)):
            apart = {t.name: _apart(t, losses[t.name], question, evidence) for t in targets}
            units.append(Unit([apart, {name: narrower}]))
            taken |= set(apart)
    others = [target for target in question.targets if target.name not in taken]
    return units + [Unit([{t.name: _apart(t, losses[t.name], question, evidence)}]) for t in others]


def least_loss(question: Question, losses: Losses, evidence: Evidence) -> Solution[Chosen | None] | None:
    """The choices of least summed loss within the budget, or None where not even the least sizes fit."""
    return solve(units_of(question, losses, evidence), question.unit.left)


def _allocate(question: Question, evidence: Evidence, settings: Any) -> Allocation:
    solution = least_loss(question, losses_of(evidence, question), evidence)
    assert solution is not None  # the least sizes fit
    forms: dict[str, Chosen] = {}
    for name, choice in solution.choices.items():
        if choice.what is not None:
            members = [t.name for t in question.mlps[name]] if name in question.mlps else [name]
            forms |= dict.fromkeys(members, choice.what)
    return Allocation(forms, predicted_loss=solution.loss, gap=solution.gap)


LOSS = Row(
    name="loss",
    summary="least loss, measured on the model, over all forms; may leave linears dense",
    source="a probe of each linear, its spectrum, and a multiple-choice knapsack (Pisinger, 1995)",
    allocate=_allocate,
    budgets=("ratio", "target_params", "target_size", "target_speedup"),
    forms=("pair", "packed", "narrow"),
    probing=Probing(
        measure=divergence,
        ranks=lambda target, round_to, settings: [probe_rank(target)],
        widths=lambda width, round_to, settings: [probe_width(width)],
    ),
    settings=ProbeSettings,
)
