"""Forms of least loss: how changing each linear or MLP alone changes the predictions, and a knapsack over all forms.

The loss of a unit at size ``r`` is ``c tail(r) / tail(r0)``: its curve of errors gives the shape, one probe at ``r0``
the height. So is that of a rounded matrix, whose errors at every number of bits are those of its rounding. Linears may
stay dense, at no loss and full price. An MLP is narrowed as a whole, or its linears are chosen apart. Embedding and
head are tried in every number of bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from svdllm.common.settings import setting
from svdllm.compression.after_analysis import AfterAnalysis
from svdllm.compression.forms import FORMS, Form
from svdllm.compression.forms.bits import CORRECTED, FACTORS_IN_BITS, INTEGERS, group_size_of
from svdllm.compression.math.linalg import tail_energies
from svdllm.compression.math.measures import divergence
from svdllm.compression.ranks.knapsack import Choice, Solution, Unit, solve
from svdllm.compression.ranks.probe_settings import ProbeSettings
from svdllm.compression.ranks.question import Allocation, Evidence, Question, rounded
from svdllm.compression.ranks.rows import Probing, Row
from svdllm.compression.ranks.uniform import uniform_rank
from svdllm.models.chosen import Chosen
from svdllm.models.structure import Target

# What a probe removes of the parameters: enough for its divergence to be above the noise of a few tokens. Alone, the
# linears of an attention change the predictions less than those of an MLP.
PROBED_RATIO, PROBED_RATIO_OF_MLPS = 0.7, 0.4
PROBED_SHARE_OF_WIDTH = 0.35

PROBED_BITS = 3
# What rounding two factors with a scale for each row loses, as a share of the energy of the outputs.
ROUNDING_OF_FACTORS = {8: 2e-4}


class LossSettings(ProbeSettings):
    """Settings of the allocation loss."""

    first_block_weight: AfterAnalysis[float] = setting(
        1.0,
        "What a loss in the first block counts for beside one in the last, linearly between (loss). Below 1 with "
        "sequential calibration: later blocks, fitted to what earlier ones give, make up for a part of it.",
        panel="Allocation",
        gt=0,
        le=1,
    )


class Losses(NamedTuple):
    """Predicted losses (nats per token): target or MLP -> loss at every size, and target -> loss in bits."""

    by_size: Mapping[str, Tensor]
    by_bits: Mapping[str, Mapping[int, float]]
    corrected: Mapping[str, Mapping[int, Tensor]] = MappingProxyType({})  # target -> bits -> loss at every rank


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


def probed_bits(bits: Sequence[int]) -> list[int]:
    """The one number of bits, of those that may be used, in which a target is probed."""
    return [min(bits, key=lambda each: abs(each - PROBED_BITS))] if bits else []


def losses_of(evidence: Evidence, question: Question) -> Losses:
    """The predicted losses of all targets and MLPs of a question, by their probes."""
    tails: dict[str, Tensor] = {}
    if any(FORMS[name].curve == "truncation" for name in question.forms):
        tails = {t.name: tail_energies(evidence.energies[t.name]) for t in question.targets}
    if any(FORMS[name].of_mlps for name in question.forms):
        tails |= {name: evidence.narrowings[name] for name in question.mlps}
    losses = {}
    for name, tail in tails.items():
        ((size, measured),) = evidence.probes[name].items()
        losses[name] = predicted_losses(tail, size, measured)
    roundings = {t.name: _rounding_losses(t, evidence) for t in question.priced if rounded(t.name) in evidence.probes}
    corrected = {
        t.name: _corrected_losses(t, evidence, roundings[t.name])
        for t in question.targets
        if t.name in evidence.corrections
    }
    return Losses(losses, roundings, corrected)


def weighted_by_block(losses: Losses, question: Question, first: float) -> Losses:
    """The losses times ``first`` in the first block to 1 in the last; those of embedding and head as they are."""
    last = max((t.block for t in question.targets), default=0)

    def weight(target: Target) -> float:
        return 1.0 if target.vocabulary or not last else first + (1 - first) * target.block / last

    weights = {t.name: weight(t) for t in question.priced}
    weights |= {name: weight(targets[0]) for name, targets in question.mlps.items()}
    return Losses(
        {name: weights[name] * tail for name, tail in losses.by_size.items()},
        {name: {bits: weights[name] * loss for bits, loss in each.items()} for name, each in losses.by_bits.items()},
        {name: {bits: weights[name] * tail for bits, tail in each.items()} for name, each in losses.corrected.items()},
    )


def _rounding_losses(target: Target, evidence: Evidence) -> dict[int, float]:
    """The predicted loss of a target in bits: measured where every number was probed, else by its errors."""
    measured = evidence.probes[rounded(target.name)]
    if target.vocabulary:
        return {bits: max(loss, 0.0) for bits, loss in measured.items()}
    ((probed, loss),) = measured.items()
    errors = evidence.roundings[target.name]
    scale = max(loss, 0.0) / errors[probed] if errors[probed] > 0 else 0.0
    return {bits: scale * error for bits, error in errors.items()}


def _corrected_losses(target: Target, evidence: Evidence, by_bits: Mapping[int, float]) -> dict[int, Tensor]:
    """Bits -> the predicted loss at every rank of a correction."""
    errors, tails = evidence.roundings[target.name], evidence.corrections[target.name]
    return {bits: tail * (by_bits[bits] / errors[bits] if errors[bits] > 0 else 0.0) for bits, tail in tails.items()}


def _apart(target: Target, losses: Losses, question: Question, evidence: Evidence) -> list[Choice[Chosen | None]]:
    """The choices of a linear by itself: its sizes in every form, and dense."""
    cost, dense = question.unit.cost, question.unit.cost(target, None)
    held = None if evidence.held is None else evidence.held.get(target.name, Chosen("pair", 0))
    options = [
        Chosen(form.name, size)
        for form in _forms(question, of_mlps=False)
        if form.curve == "truncation"
        for size in form.sizes(target, question.round_to)
        if held is None or size <= held.size
    ]
    choices: list[Choice[Chosen | None]] = [] if target.name in evidence.not_dense else [Choice(None, dense, 0.0)]
    by_size = losses.by_size.get(target.name)
    if by_size is None:
        return choices + _in_bits(target, losses, question)
    for chosen in options:
        in_factors = ROUNDING_OF_FACTORS.get(FORMS[chosen.form].factor_bits or 0, 0.0) * float(by_size[0])
        choices.append(Choice(chosen, cost(target, chosen), float(by_size[chosen.size]) + in_factors))
    return choices + _in_bits(target, losses, question)


def _in_bits(target: Target, losses: Losses, question: Question) -> list[Choice[Chosen | None]]:
    """The choices of a matrix in few bits."""
    by_bits = losses.by_bits.get(target.name, {})
    forms = [form for form in _forms(question, of_mlps=False) if form.bits in by_bits]
    chosen = [(Chosen(form.name, group_size_of(target)), by_bits[form.bits]) for form in forms if form.bits]
    for form in _forms(question, of_mlps=False):
        if form.curve == "correction" and form.base is not None and target.name in losses.corrected:
            by_rank = losses.corrected[target.name][form.base.bits or 0]
            ranks = form.sizes(target, question.round_to)
            chosen += [(Chosen(form.name, rank), float(by_rank[rank])) for rank in ranks]
    return [Choice(each, question.unit.cost(target, each), loss) for each, loss in chosen]


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
        if name in losses.by_size and (narrower := _together(targets, losses.by_size[name], question)):
            apart = {t.name: _apart(t, losses, question, evidence) for t in targets}
            units.append(Unit([apart, {name: narrower}]))
            taken |= set(apart)
    others = {name: members for name, members in question.joined.items() if name not in taken}
    return units + [Unit([{name: _alike(t, losses, question, evidence)}]) for name, t in others.items()]


def _alike(
    targets: Sequence[Target], losses: Losses, question: Question, evidence: Evidence
) -> list[Choice[Chosen | None]]:
    """The choices of targets that get one form: those that each of them has, at their costs and losses together."""
    own = [{choice.what: choice for choice in _apart(t, losses, question, evidence)} for t in targets]
    common = [what for what in own[0] if all(what in choices for choices in own)]
    return [
        Choice(what, sum(each[what].cost for each in own), fsum(each[what].loss for each in own)) for what in common
    ]


def least_loss(question: Question, losses: Losses, evidence: Evidence) -> Solution[Chosen | None] | None:
    """The choices of least summed loss within the budget, or None where not even the least sizes fit."""
    return solve(units_of(question, losses, evidence), question.unit.left)


def _allocate(question: Question, evidence: Evidence, settings: Any) -> Allocation:
    losses = weighted_by_block(losses_of(evidence, question), question, settings.first_block_weight)
    solution, joined = least_loss(question, losses, evidence), question.joined
    assert solution is not None  # the least sizes fit
    forms: dict[str, Chosen] = {}
    for name, choice in solution.choices.items():
        if choice.what is not None:
            members = question.mlps.get(name) or joined[name]
            forms |= dict.fromkeys((target.name for target in members), choice.what)
    return Allocation(forms, predicted_loss=solution.loss, gap=solution.gap)


LOSS = Row(
    name="loss",
    summary="least loss, measured on the model, over all forms; may leave linears dense",
    source="a probe of each linear, its spectrum, and a multiple-choice knapsack (Pisinger, 1995)",
    allocate=_allocate,
    budgets=("ratio", "target_params", "target_size", "target_speedup"),
    forms=("pair", "packed", "narrow"),
    other_forms=tuple(row.name for row in (*INTEGERS, *FACTORS_IN_BITS, *CORRECTED)),
    probing=Probing(
        measure=divergence,
        ranks=lambda target, round_to, settings: [probe_rank(target)],
        widths=lambda width, round_to, settings: [probe_width(width)],
        bits=lambda bits, settings: probed_bits(bits),
    ),
    settings=LossSettings,
)
