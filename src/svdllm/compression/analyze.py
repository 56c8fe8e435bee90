"""From tokens to spectra: the walks that accumulate statistics, and the decompositions.

One forward walk collects the Gram of every input. With the two-sided metric a reverse walk follows, which collects the
Gram of every output's gradient; the input Grams wait on disk until it reaches their block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svdllm.common.errors import InputError, NumericalError
from svdllm.common.progress import Reporter
from svdllm.compression.analysis import Analysis
from svdllm.compression.math.linalg import Spectrum, equal_energies, output_spectrum, shrunk_to_diagonal, shrunk_to_mean
from svdllm.compression.math.metrics import METHODS, Method
from svdllm.compression.math.statistics import Gram, RowFisher, Statistic
from svdllm.compression.recipe import Recipe
from svdllm.models.hooks import input_groups
from svdllm.models.linears import matches
from svdllm.models.structure import Target, weight_of
from svdllm.models.walk import Block, Walk

# Keeps the left metric of several linears defined where one of them has no gradient.
LEAST_SHARE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The analysis of a model on its calibration tokens; every finished block is a file."""

    walk: Walk
    recipe: Recipe
    analysis: Analysis
    depths: Mapping[str, int]  # target -> directions to keep
    keeps_left_metrics: bool  # for a sequential calibration
    reporter: Reporter

    @property
    def method(self) -> Method:
        return METHODS[self.recipe.method]

    @property
    def reverse(self) -> bool:
        """Whether a reverse walk follows, which the spectra wait for."""
        return self.recipe.needs_gradients

    def run(self) -> None:
        blocks = range(len(self.walk.structure.blocks))
        if all(map(self.analysis.is_done, blocks)):
            return
        if done := sum(map(self.analysis.is_ready if self.reverse else self.analysis.is_done, blocks)):
            self.reporter.note(f"Going on with an earlier run: {done} of {len(blocks)} blocks are done.")
        with self._stage("analyze", len(self.walk.batches)):
            for block in self.walk.blocks():
                self._forward(block)
        if self.reverse:
            with self._stage("gradients", self.walk.kept_batches):
                for block in self.walk.reversed_blocks(self._loss_gradient):
                    self._backward(block)
        self.walk.close()

    def _forward(self, block: Block) -> None:
        """Algorithm 1, lines 5 to 9, and Algorithm 2: the Grams of the inputs, then the spectrum of every weight."""
        targets = self.walk.structure.block_targets(block.index)
        if self.analysis.is_ready(block.index) if self.reverse else self.analysis.is_done(block.index):
            if self.method.needs_tokens:
                block.run()
            return
        started = time.perf_counter()
        statistics: dict[str, Statistic] = {}
        if self.method.statistic is not None:
            statistics = collect_statistics(block, targets, self.method)
        elif self.method.needs_tokens:
            block.run()
        forward = time.perf_counter() - started

        def metric_of(target: Target) -> Tensor | None:
            return right_metric(
                target,
                statistics,
                self.method,
                alpha=self.recipe.asvd_alpha,
                shrinkage=self.recipe.shrinkage,
                centred=self.recipe.bias_correction,
            )

        leaders = {target.group: target for target in targets}
        means = {}
        if self.recipe.bias_correction:
            grams = {group: statistics[target.name] for group, target in leaders.items()}
            means = {group: gram.mean() for group, gram in grams.items() if isinstance(gram, Gram)}
        if self.reverse:
            metrics = {group: metric_of(target) for group, target in leaders.items()}
            known = {group: metric for group, metric in metrics.items() if metric is not None}
            self.analysis.write_metrics(block.index, known, means, forward)
        else:
            self._decompose(block, targets, metric_of, means, forward)

    def _backward(self, block: Block) -> None:
        targets = self.walk.structure.block_targets(block.index)
        if self.analysis.is_done(block.index):
            block.run_backward()
            return
        started = time.perf_counter()
        lefts = self._left_metrics(block, targets)
        if self.keeps_left_metrics:
            self.analysis.write_left_metrics(block.index, lefts)
        seconds = time.perf_counter() - started + self.analysis.seconds(block.index)[""]
        means = {}
        if self.recipe.bias_correction:
            means = {target.group: self.analysis.mean(target, waiting=True) for target in targets}
        self._decompose(block, targets, self.analysis.metric, means, seconds, lefts)

    def _left_metrics(self, block: Block, targets: list[Target]) -> dict[str, Tensor]:
        if self.method.left is not None:
            fishers = collect_fisher(block, targets)
            return {name: torch.diag(self.method.left(fisher.value())) for name, fisher in fishers.items()}
        input_only = {t.name: [name for name in t.linears if self._input_only(name)] for t in targets}
        gradients = collect_gradients(block, [t for t in targets if len(input_only[t.name]) < len(t.linears)])
        shrinkage = self.recipe.gradient_shrinkage
        return {
            t.name: joint_left_metric(t, gradients[t.name].value(), input_only[t.name], shrinkage)
            if t.parts
            else shrunk_to_mean(gradients[t.name].value(), shrinkage)
            for t in targets
            if t.name in gradients
        }

    def _input_only(self, linear: str) -> bool:
        return any(matches(pattern, linear) for pattern in self.recipe.input_only)

    def _decompose(
        self,
        block: Block,
        targets: list[Target],
        metric_of: Callable[[Target], Tensor | None],
        means: Mapping[str, Tensor],
        walked: float,
        lefts: Mapping[str, Tensor] | None = None,
    ) -> None:
        spectra, seconds = decompose(block, targets, metric_of, self.depths, lefts or {})
        self.analysis.write(block.index, spectra, {"": walked, **seconds}, means)
        self.reporter.block_done(block.index, len(self.walk.structure.blocks), walked, sum(seconds.values()))

    def _loss_gradient(self, windows: slice, logits: Tensor) -> Tensor:
        """Gradient of the summed cross-entropy of the text in the logits: ``softmax - one-hot`` where a token follows."""
        following = self.walk.ids[windows, 1:, None].to(logits.device)
        gradient = logits.float().softmax(-1)
        gradient[:, :-1].scatter_add_(-1, following, torch.full_like(following, -1, dtype=gradient.dtype))
        gradient[:, -1] = 0
        return gradient.to(logits.dtype)

    def _stage(self, name: str, batches: int):
        steps = len(self.walk.structure.blocks) * batches
        self.walk.on_batch = lambda block, done, of: self.reporter.advance(block * of + done, steps)
        return self.reporter.stage(name, steps)


def collect_statistics(block: Block, targets: list[Target], method: Method) -> dict[str, Statistic]:
    """Runs a block over all its batches and accumulates one statistic per distinct input.

    Returns a dict target -> statistic; targets that read the same tensor share the object.
    """
    linears = [(target.name, block.walk.skeleton.get_submodule(target.linears[0])) for target in targets]
    in_features = {target.name: target.in_features for target in targets}
    statistics: dict[str, Statistic] = {}
    assert method.statistic is not None

    def on_input(leader: str, inputs: Tensor) -> None:
        if leader not in statistics:
            statistics[leader] = method.statistic(in_features[leader], inputs.device)  # type: ignore[misc]
        statistics[leader].add(inputs)

    with input_groups(linears, on_input) as (groups, release):
        block.run(after_batch=release)
    uncalled = [name for name, _ in linears if name not in groups]
    if uncalled:
        raise InputError(f"{', '.join(uncalled)} saw no token; leave them dense with --ignore.")
    return {target.name: statistics[groups[target.name]] for target in targets}


def right_metric(
    target: Target,
    statistics: Mapping[str, Statistic],
    method: Method,
    *,
    alpha: float,
    shrinkage: float,
    centred: bool = False,
) -> Tensor | None:
    """The metric ``C = S S^T`` of a target, from what was accumulated over its inputs; ``centred`` if a bias is added.

    Raises:
        NumericalError: the inputs are not finite.
    """
    statistic = statistics.get(target.name)
    value = None if statistic is None else statistic.value()
    if centred and isinstance(statistic, Gram):
        value = statistic.centred()
    metric = method.right(value, alpha)
    if metric is not None and not bool(torch.isfinite(metric).all()):
        raise NumericalError(f"The inputs of {target.name} have NaN or infinite values over the calibration text.")
    return shrunk_to_diagonal(metric, shrinkage)


def collect_gradients(block: Block, targets: list[Target]) -> dict[str, Gram]:
    """Runs a block backward over the kept batches and accumulates ``G``, the Gram of each target's output gradients."""
    grams: dict[str, Gram] = {}

    def watch(target: Target, inputs: Tensor, gradients: Tensor) -> None:
        if target.name not in grams:
            grams[target.name] = Gram(target.out_features, gradients.device)
        grams[target.name].add(gradients)

    _run_backward(block, targets, watch)
    return grams


def joint_left_metric(target: Target, gradient_OO: Tensor, input_only: Sequence[str], shrinkage: float) -> Tensor:
    """Of several linears with one first factor: the left metric of each in its place, in proportion to its gradients.

    A linear that is to be judged by its inputs alone keeps that proportion and no direction.
    """
    whole = gradient_OO.diagonal().mean().clamp_min(torch.finfo(gradient_OO.dtype).tiny)
    blocks, start = [], 0
    for name, size in target.parts:
        own_OO = gradient_OO[start : start + size, start : start + size]
        share = (own_OO.diagonal().mean() / whole).clamp_min(LEAST_SHARE)
        blocks.append(share * shrunk_to_mean(own_OO, 1.0 if name in input_only else shrinkage))
        start += size
    return torch.block_diag(*blocks)


def left_metric_of(target: Target, weight_OI: Tensor, metric: Tensor | None, left_OO: Tensor | None) -> Tensor | None:
    """The left metric; several linears with one first factor that have none count for as much as each other."""
    if left_OO is not None or not target.parts:
        return left_OO
    return equal_energies(list(target.split(weight_OI).values()), metric)


def collect_fisher(block: Block, targets: list[Target]) -> dict[str, RowFisher]:
    """Runs a block backward over the kept batches and accumulates the Fisher information of each target's rows."""
    fishers: dict[str, RowFisher] = {}
    seqlen = block.walk.ids.shape[1]

    def watch(target: Target, inputs: Tensor, gradients: Tensor) -> None:
        if target.name not in fishers:
            fishers[target.name] = RowFisher(target.out_features, gradients.device)
        fishers[target.name].add(_by_window(inputs, seqlen), _by_window(gradients, seqlen))

    _run_backward(block, targets, watch)
    return fishers


def _by_window(tokens: Tensor, seqlen: int) -> Tensor:
    """(windows, seqlen, features), also of what some models hand on as one row of tokens (experts: as one window)."""
    if tokens.ndim == 2:
        return tokens.unflatten(0, (-1, seqlen if len(tokens) % seqlen == 0 else len(tokens)))
    return tokens


def _run_backward(block: Block, targets: list[Target], watch: Callable[[Target, Tensor, Tensor], None]) -> None:
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
            output.register_hook(lambda gradients: after_backward(inputs, gradients))

        return block.walk.skeleton.get_submodule(linear).register_forward_hook(after_forward)

    handles = [on(target, linear) for target in targets for linear in target.linears]
    try:
        block.run_backward()
    finally:
        for handle in handles:
            handle.remove()


def decompose(
    block: Block,
    targets: list[Target],
    metric_of: Callable[[Target], Tensor | None],
    depths: Mapping[str, int],
    lefts: Mapping[str, Tensor],
) -> tuple[dict[str, Spectrum], dict[str, float]]:
    """Spectra and bases of a block's targets, and the seconds each took.

    ``metric_of`` gives the right metric, asked once per group; ``lefts`` are the left ones, by target.
    """
    spectra, seconds = {}, {}
    metrics: dict[str, Tensor | None] = {}
    for target in targets:
        started = time.perf_counter()
        if target.group not in metrics:
            metrics = {target.group: metric_of(target)}  # the one before is not needed again
        weight_OI = weight_of(block.walk.skeleton, target)
        metric = metrics[target.group]
        metric = metric if metric is None else metric.to(weight_OI.device)
        try:
            left_OO = left_metric_of(target, weight_OI, metric, lefts.get(target.name))
            spectrum = output_spectrum(weight_OI, metric, depths[target.name], left_gram_OO=left_OO)
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise NumericalError(f"The spectrum of {target.name} did not converge: {error}") from error
        stored_dtype = torch.float64 if block.walk.dtype == torch.float64 else torch.float32
        spectra[target.name] = spectrum.to(dtype=stored_dtype)
        seconds[target.name] = time.perf_counter() - started
    return spectra, seconds
