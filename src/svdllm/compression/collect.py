"""Collects statistics of the linears of a loaded block, and makes metrics of them.

The right metric of a linear comes from its inputs, the left metric from the gradients of its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from svdllm.common.errors import InputError, NumericalError
from svdllm.compression.few_tokens import GroupStatistic, with_group_statistics
from svdllm.compression.math.linalg import equal_energies
from svdllm.compression.math.metrics import Method
from svdllm.compression.math.pullback import Pullback
from svdllm.compression.math.statistics import BackwardStatistic, GradientPullback, Gram, Statistic
from svdllm.compression.math.totals import fold_each
from svdllm.compression.parts import Part
from svdllm.compression.recipe import Recipe
from svdllm.models.hooks import first_argument
from svdllm.models.linears import listing
from svdllm.models.structure import Target, weight_of
from svdllm.models.walk import Block

Statistics = Callable[[int, torch.device | str], BackwardStatistic]  # of out_features


def collect_statistics(block: Block, part: Part, method: Method) -> dict[str, Statistic]:
    """Runs a block over all its batches and accumulates one statistic per distinct input.

    Tokens of an expert count with the squares of their routing weights. An expert that few tokens are routed to takes
    a part from the others of its layer.

    Returns a dict target -> statistic; targets that read the same tensor share the object.

    Raises:
        InputError: no token reaches a linear, or any expert of a layer.
    """
    targets, grouped = part.targets, {target.name for target in part.grouped}
    statistics: dict[str, Statistic] = {}
    make = method.statistic
    assert make is not None
    routed = RoutingWeights()
    leaders = {target.name: target for target in (*targets, *part.grouped) if target.name == target.group}
    collected = {target.name for target in targets}

    def on(leader: Target) -> Any:
        def before_forward(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = first_argument(args, kwargs)
            sums = [(statistics, leader.group)] * (leader.name in collected)
            sums += [(part.groups, str(leader.pool))] * (leader.name in grouped)
            for kept, name in sums:
                if name not in kept:
                    kept[name] = make(leader.in_features, inputs.device)
                kept[name].add(inputs, routed.of(leader))

        linear = block.walk.skeleton.get_submodule(leader.linears[0])
        return linear.register_forward_pre_hook(before_forward, with_kwargs=True)

    processes, widths = block.walk.processes, {leader.group: leader.in_features for leader in leaders.values()}
    widths |= {str(leader.pool): leader.in_features for leader in leaders.values()}

    def after_round() -> None:
        for kept in (statistics, part.groups):
            fold_each(kept, lambda name: make(widths[name], block.walk.device), processes)

    handles = [on(leader) for leader in leaders.values()]
    try:
        with routed.noted(block, leaders.values()):
            block.run(advance=part.is_last, after_round=after_round)
    finally:
        for handle in handles:
            handle.remove()
    statistics = with_group_statistics(targets, statistics, part.groups)
    if uncalled := [target.name for target in targets if target.group not in statistics]:
        raise InputError(f"{listing(uncalled)} saw no token; leave them dense with --ignore.")
    return {target.name: statistics[target.group] for target in targets}


class RoutingWeights:
    """Notes the weights of the tokens that each expert of a block is handed, while it handles them."""

    def __init__(self) -> None:
        self._weights: dict[str, Tensor] = {}

    def of(self, target: Target) -> Tensor | None:
        """The weights of the tokens that a linear is handed; None outside experts."""
        return None if target.expert is None else self._weights[target.expert]

    @contextmanager
    def noted(self, block: Block, targets: Iterable[Target]) -> Iterator[None]:
        """Watches the experts of some targets while the context lasts."""

        def on(expert: str) -> Any:
            def note(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
                self._weights[expert] = args[1].detach()

            return block.walk.skeleton.get_submodule(expert).register_forward_pre_hook(note)

        handles = [on(expert) for expert in dict.fromkeys(t.expert for t in targets) if expert is not None]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def right_metric(target: Target, statistics: Mapping[str, Statistic], method: Method, recipe: Recipe) -> Tensor | None:
    """The metric ``C = S S^T`` of a target, from what was accumulated over its inputs; centred if a bias is added.

    Raises:
        NumericalError: the inputs are not finite.
    """
    statistic = statistics.get(target.name)
    value = None if statistic is None else statistic.value()
    if recipe.bias_correction and isinstance(statistic, Gram | GroupStatistic):
        value = statistic.centred()
    metric = method.right(value, recipe)
    if metric is not None and not bool(metric.sum().isfinite()):
        raise NumericalError(f"The inputs of {target.name} have NaN or infinite values over the calibration text.")
    return metric


def left_metric_of(
    target: Target, weight_OI: Tensor, metric: Tensor | None, left: Tensor | Pullback | None
) -> Tensor | Pullback | None:
    """The left metric; several linears with one first factor that have none count for as much as each other."""
    if left is not None or not target.parts:
        return left
    return equal_energies(list(target.split(weight_OI).values()), metric)


def collect_backward(
    block: Block, part: Part, statistic: Statistics, pulled_back: Container[str] = ()
) -> dict[str, BackwardStatistic]:
    """Runs a block backward over the kept batches and accumulates one statistic per target, by its name.

    A target that the loss does not reach is not in it.

    Args:
        statistic: makes one, from out_features and device.
        pulled_back: names of targets whose gradients are added up after their weights.
    """
    statistics: dict[str, BackwardStatistic] = {}
    collected, grouped = ({target.name for target in targets} for targets in (part.targets, part.grouped))
    seqlen = block.walk.ids.shape[1]

    def make(name: str) -> BackwardStatistic:
        if name in pulled_back:
            target = watched[name]
            return GradientPullback(list(target.split(weight_of(block.walk.skeleton, target)).values()))
        return statistic(widths[name], block.walk.device)

    def watch(target: Target, inputs: Tensor, gradients: Tensor) -> None:
        if target.pool is not None:  # the tokens of several windows, as one
            inputs, gradients = inputs[None], gradients[None]
        sums = [(statistics, target.name)] * (target.name in collected)
        sums += [(part.groups, str(target.pool))] * (target.name in grouped)
        for kept, name in sums:
            if name not in kept:
                kept[name] = make(name)
            kept[name].add(_by_window(inputs, seqlen), _by_window(gradients, seqlen))

    watched = {target.name: target for target in (*part.targets, *part.grouped)}
    widths = {target.name: target.out_features for target in watched.values()}
    widths |= {str(target.pool): target.out_features for target in watched.values()}

    def after_round() -> None:
        for kept in (statistics, part.groups):
            fold_each(kept, make, block.walk.processes)

    _run_backward(block, list(watched.values()), watch, after_round, advance=part.is_last)
    return with_group_statistics(part.targets, statistics, part.groups)


def _by_window(tokens: Tensor, seqlen: int) -> Tensor:
    """(windows, seqlen, features), also of what some models hand on as one row of tokens."""
    if tokens.ndim == 2:
        return tokens.unflatten(0, (-1, seqlen if len(tokens) % seqlen == 0 else len(tokens)))
    return tokens


def _run_backward(
    block: Block,
    targets: list[Target],
    watch: Callable[[Target, Tensor, Tensor], None],
    after_round: Callable[[], None],
    *,
    advance: bool,
) -> None:
    """``watch(target, inputs, gradients of the outputs)`` is called for every target and batch."""
    arrived: dict[str, dict[str, Tensor]] = {}

    def on(target: Target, linear: str) -> Any:
        def after_backward(inputs: Tensor, gradients: Tensor) -> None:
            parts = arrived.setdefault(target.name, {})
            parts[linear] = gradients
            if len(parts) == len(target.linears):
                del arrived[target.name]
                watch(target, inputs, torch.cat([parts[name] for name in target.linears], dim=-1))

        def after_forward(module: torch.nn.Module, args: Any, output: Tensor) -> None:
            inputs = args[0].detach()
            if output.requires_grad:  # else it is judged by its inputs alone
                output.register_hook(lambda gradients: after_backward(inputs, gradients))

        return block.walk.skeleton.get_submodule(linear).register_forward_hook(after_forward)

    handles = [on(target, linear) for target in targets for linear in target.linears]
    try:
        block.run_backward(advance=advance, after_round=after_round)
    finally:
        for handle in handles:
            handle.remove()
