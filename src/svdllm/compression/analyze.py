"""Analyses a model on its calibration tokens: collects statistics block by block, then decomposes every weight.

A forward walk collects the Gram of every input. With the two-sided metric a reverse walk follows, which collects the
Gram of the gradients of every output. Until the reverse walk reaches a block, its input Grams are kept on disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from svdllm.checkpoint.output import LOCK, start_over
from svdllm.common.locks import locked
from svdllm.common.processes import ALONE, Processes
from svdllm.common.progress import Reporter
from svdllm.common.settings_file import read_settings
from svdllm.compression.analysis import Analysis
from svdllm.compression.analysis_settings import settings_beside_the_recipe
from svdllm.compression.collect import collect_backward, collect_statistics, right_metric
from svdllm.compression.decompose import cost, decompose
from svdllm.compression.few_tokens import ExpertTokens, GroupStatistic, expert_tokens
from svdllm.compression.forms import FORMS, bits_in, corrected_bits, most_rank, rank_of
from svdllm.compression.math.metrics import METHODS, Method
from svdllm.compression.math.pullback import Pullback
from svdllm.compression.math.statistics import Gram, Statistic
from svdllm.compression.parts import Part, parts_of
from svdllm.compression.plan import Plan
from svdllm.compression.pulled_back import pulled_back
from svdllm.compression.recipe import Recipe
from svdllm.compression.records import Provenance
from svdllm.compression.session import Run, recipe_settings
from svdllm.compression.shared_statistics import SharedStatistics, shared_statistics
from svdllm.compression.subject import Subject
from svdllm.data import TokenWindows
from svdllm.models.batches import windows_per_batch
from svdllm.models.logits import loss_gradient
from svdllm.models.structure import Structure, Target
from svdllm.models.walk import Block, Walk


@contextmanager
def open_analysis(run: Run, subject: Subject, provenance: Provenance) -> Iterator[Analysis]:
    """The analysis of a run. No other run writes to it while the context lasts; afterwards it is only read.

    Raises:
        InputError: it was begun with other settings, which are named, or another run is writing to it.
    """
    processes = run.processes
    if processes.is_first and (not run.resume or not read_settings(run.analysis_folder)):
        start_over(run.work)
    beside = settings_beside_the_recipe(run.recipe, subject, provenance)
    own = Analysis(run.analysis_folder, recipe_settings(run.recipe.to_dict()) | beside)
    processes.first_then_others(own.open)
    if run.analysis_dir is None:
        yield own
        return
    with locked(run.analysis_dir / LOCK, run.analysis_dir) if processes.is_first else nullcontext() as warning:
        if warning is not None:
            run.reporter.warn(warning)
        shared = Analysis(run.analysis_dir, recipe_settings(run.recipe.analysis_settings()) | beside)
        if processes.is_first:
            shared.open()
        processes.require_shared(run.analysis_dir)
        shared.open()
        yield shared
        processes.wait()


def analyze(
    run: Run, subject: Subject, windows: TokenWindows | None, plans: Sequence[Plan], analysis: Analysis
) -> None:
    """Algorithm 1, lines 5 to 9, and Algorithm 2: the statistics of the tokens and the spectrum of every weight.

    Raises:
        NumericalError: a hidden state, a gradient or a metric is NaN or infinite, or a spectrum does not converge.
    """
    recipe = run.recipe
    ids, sharing = torch.zeros(1, 2, dtype=torch.long), None  # for a method that does not read the text
    if windows is not None and METHODS[recipe.method].needs_tokens:
        ids, sharing = windows.ids, run.processes
    walk = subject.walk(ids, recipe, run.spill_file(plans[0]), run.scratch(plans[0]), sharing)
    if recipe.needs_gradients:
        walk.kept_folder = run.inputs_folder
        kept = min(recipe.gradient_samples, len(ids))
        walk.kept_batches = -(-kept // windows_per_batch(recipe.batch_tokens, ids.shape[1]))
    bits = bits_in(recipe.analysed_forms)
    Calibration(
        walk=walk,
        recipe=recipe,
        analysis=analysis,
        depths=_depths(subject.structure, plans),
        narrows=any(FORMS[name].of_mlps for name in recipe.analysed_forms),
        bits=bits,
        corrected=corrected_bits(recipe.analysed_forms),
        keeps_metrics=recipe.calibration_mode == "sequential" or run.analysis_dir is not None or bool(bits),
        shared=shared_statistics(run, analysis),
        processes=run.processes,
        reporter=run.reporter,
    ).run()
    run.processes.wait()  # for the last file
    if known := ExpertTokens.of(analysis.expert_tokens(), subject.structure.targets):
        known.warn(run.reporter)


def _depths(structure: Structure, plans: Sequence[Plan]) -> dict[str, int]:
    """Target -> directions of its basis to keep: the largest rank of the recipe's forms, or a larger explicit one.

    0 for a recipe that truncates nothing.
    """
    forms = plans[0].recipe.analysed_forms
    depths = {target.name: max(target.break_even_rank, most_rank(target, forms)) for target in structure.targets}
    if not plans[0].recipe.truncates:
        depths = dict.fromkeys(depths, 0)
    for plan in plans:
        for name, chosen in plan.forms.items():
            depths[name] = max(depths.get(name, 0), rank_of(chosen) or 0)
    return depths


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The walks of an analysis. Every finished block is a file, and a resumed run skips it."""

    walk: Walk
    recipe: Recipe
    analysis: Analysis
    depths: Mapping[str, int]  # target -> directions of its basis to keep
    narrows: bool  # whether MLPs may be narrowed
    keeps_metrics: bool  # a sequential calibration reads them, and so does rounding
    bits: Sequence[int] = ()  # in which targets may be stored
    corrected: Sequence[int] = ()  # of these, those that may have a correction
    shared: SharedStatistics | None = None
    processes: Processes = ALONE
    reporter: Reporter

    @property
    def method(self) -> Method:
        return METHODS[self.recipe.method]

    @property
    def reverse(self) -> bool:
        """Whether a reverse walk follows, after which the spectra are computed."""
        return self.recipe.needs_gradients

    def run(self) -> None:
        blocks = range(len(self.walk.structure.blocks))
        is_ready = self.analysis.is_ready if self.reverse else self.analysis.is_done
        done, ready = self.processes.from_first(
            lambda: [list(map(self.analysis.is_done, blocks)), list(map(is_ready, blocks))]
        )
        if all(done):
            return
        if any(ready):
            self.reporter.note(f"Continuing an earlier run: {sum(ready)} of {len(blocks)} blocks are done.")
        with self._stage("analyze", len(self.walk.batches)):
            for block in self.walk.blocks():
                self._forward(block, is_ready=ready[block.index])
        if self.reverse:
            ids = self.walk.ids
            self.processes.wait()  # for the files that the first one writes
            with self._stage("gradients", len(self.walk.kept)):
                for block in self.walk.reversed_blocks(lambda windows, logits: loss_gradient(ids[windows], logits)):
                    self._backward(block, is_done=done[block.index])
        self.walk.close()

    def _forward(self, block: Block, *, is_ready: bool) -> None:
        """Collects the metrics of the inputs of a block, and decomposes its weights unless a reverse walk follows."""
        if is_ready:
            if self.method.needs_tokens:
                block.run()
            return
        tokens: dict[str, int] = {}
        seconds: dict[str, float] = {"": 0.0}
        for part in self._parts(block):
            self._forward_part(block, part, tokens, seconds)

    def _parts(self, block: Block) -> list[Part]:
        targets, mixture = self.walk.structure.block_targets(block.index), bool(self.walk.structure.pools)
        pulled = pulled_back(targets, self.recipe, self.walk.skeleton)
        return parts_of(targets, self.depths, pulled, mixture=mixture)

    def _forward_part(self, block: Block, part: Part, tokens: dict[str, int], seconds: dict[str, float]) -> None:
        """The forward walk over a part; adds the experts' tokens and the seconds to those of the parts before."""
        targets, started = part.targets, time.perf_counter()
        statistics: dict[str, Statistic] = {}
        if self.method.statistic is not None:
            statistics = self._statistics(block, part)
        elif self.method.needs_tokens:
            block.run(advance=part.is_last)
        seconds[""] += time.perf_counter() - started
        tokens |= expert_tokens(targets, statistics)
        if part.is_last and tokens and self.processes.is_first:
            self.analysis.write_expert_tokens(block.index, tokens)

        def metric_of(target: Target) -> Tensor | None:
            return right_metric(target, statistics, self.method, self.recipe)

        leaders = {target.group: target for target in targets}
        means = {}
        if self.recipe.bias_correction:
            grams = {group: statistics[target.name] for group, target in leaders.items()}
            means = {group: gram.mean() for group, gram in grams.items() if isinstance(gram, Gram | GroupStatistic)}
        if self.processes.is_first and (self.reverse or self.keeps_metrics):
            metrics = ((group, metric_of(target)) for group, target in leaders.items())
            known = {group: metric.float() for group, metric in metrics if metric is not None}
            self.analysis.write_metrics(block.index, known, means, seconds[""], part.number)
        if not self.reverse:
            self._decompose(block, part, metric_of, means, seconds)

    def _statistics(self, block: Block, part: Part) -> dict[str, Any]:
        """Runs a block and collects its statistics, or reads those of an earlier run over the same tokens.

        Such a run is only repeated where a reverse walk needs the inputs of the block.
        """
        targets = part.targets
        if self.shared is None or len(targets) < len(self.walk.structure.block_targets(block.index)):
            return collect_statistics(block, part, self.method)
        shared, num_blocks = self.shared, len(self.walk.structure.blocks)
        if self.processes.from_first(lambda: shared.is_complete(num_blocks)):
            if self.reverse:
                block.run()
            return self.shared.read(block.index, targets)
        statistics = collect_statistics(block, part, self.method)
        if self.processes.is_first:
            self.shared.write(block.index, targets, statistics)
        return statistics

    def _backward(self, block: Block, *, is_done: bool) -> None:
        """Collects the metrics of the outputs of a block, and decomposes its weights."""
        if is_done:
            block.run_backward()
            return
        seconds = {"": self.analysis.seconds(block.index)[""]}
        for part in self._parts(block):
            started = time.perf_counter()
            lefts = self._left_metrics(block, part)
            if self.keeps_metrics and self.processes.is_first:
                self.analysis.write_left_metrics(block.index, lefts, part.number)
            seconds[""] += time.perf_counter() - started
            means = {}
            if self.recipe.bias_correction:
                means = {target.group: self.analysis.mean(target, waiting=True) for target in part.targets}
            self._decompose(block, part, self.analysis.metric, means, seconds, lefts)

    def _left_metrics(self, block: Block, part: Part) -> dict[str, Tensor | Pullback]:
        left = self.recipe.left_metric
        assert left is not None
        weighed, grouped = (
            [target for target in targets if left.weighs(target, self.recipe)]
            for targets in (part.targets, part.grouped)
        )
        part, pulled = (
            replace(part, targets=weighed, grouped=grouped),
            pulled_back(weighed, self.recipe, self.walk.skeleton),
        )
        statistics = collect_backward(block, part, left.statistic, pulled)
        return {
            t.name: left.metric(t, statistics.pop(t.name).value(), self.recipe) for t in weighed if t.name in statistics
        }

    def _decompose(
        self,
        block: Block,
        part: Part,
        metric_of: Callable[[Target], Tensor | None],
        means: Mapping[str, Tensor],
        seconds: dict[str, float],
        lefts: dict[str, Tensor | Pullback] | None = None,
    ) -> None:
        """Decomposes the weights of a part; adds the seconds to those of the parts before.

        Every process decomposes some of them, and leaves what it finds in the folder of the analysis.
        """
        targets = [part.targets[number] for number in self.processes.own(list(map(cost, part.targets)))]
        consumers = [t for t in targets if self.narrows and t.inner is not None and t.inner.side == "in"]
        made = decompose(block, targets, metric_of, self.depths, lefts or {}, consumers, self.bits, self.corrected)
        if not self.processes.is_first:
            self.analysis.write_share(block.index, made, self.processes.rank, part.number)
        for own in self.processes.gather(made.seconds):
            seconds |= own
        if self.processes.is_first:
            self.analysis.write(block.index, made, seconds, means, keep_metrics=self.keeps_metrics, part=part.number)
        if part.is_last:
            walked = seconds[""]
            spent = sum(seconds.values()) - walked
            self.reporter.block_done(block.index, len(self.walk.structure.blocks), walked, spent)

    def _stage(self, name: str, batches: int):
        steps = len(self.walk.structure.blocks) * batches
        self.walk.on_batch = lambda block, done, of: self.reporter.advance(block * of + done, steps)
        return self.reporter.stage(name, steps)
