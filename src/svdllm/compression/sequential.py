"""Sequential calibration: fits every linear to the inputs that it gets in the compressed model.

Two streams of hidden states go through the blocks, one of the dense model and one of the compressed model. Within a
block the groups are compressed in the order in which the model calls them: q, k, v; o; gate, up; down. Each linear is
fitted to ``W* = W + beta W (X - X') X'^T S'^-1`` in the metric of ``S'``, which corrects part of the error of the
linears before it. A linear whose output is added to the residual stream is fitted to ``W X + R``: ``R`` is what the
dense stream has there and the compressed one lacks. A linear that stays dense becomes ``W*`` itself, which costs no
parameters. A narrower MLP reads the features that the dense analysis kept, by the regression on them. The forms must be
known, so this walk follows a dense analysis and an allocation.

Source: error-propagation aware (anchored) calibration, as in AA-SVD; the fit to the residual stream is our own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from svdllm.common.errors import NumericalError
from svdllm.common.progress import Reporter
from svdllm.compression.analysis import Analysis, FinalFactors
from svdllm.compression.collect import left_metric_of
from svdllm.compression.decompose import cost
from svdllm.compression.expert_products import expert_products
from svdllm.compression.few_tokens import group_tokens
from svdllm.compression.forms import FORMS, bits_of
from svdllm.compression.forms.bits import fitted_rounding, product_of
from svdllm.compression.math.linalg import (
    anchored,
    anchored_with_pullback,
    corrected_bias,
    factorise,
    output_spectrum,
)
from svdllm.compression.math.narrowing import narrowed_anchored, with_zeros
from svdllm.compression.math.pullback import Pullback
from svdllm.compression.parts import parts_of
from svdllm.compression.plan import Plan
from svdllm.compression.products import Products, Sums
from svdllm.compression.pulled_back import pulled_back
from svdllm.compression.recipe import Recipe
from svdllm.compression.recipe_sequential import digest_of
from svdllm.compression.rounded_targets import corrected_target, rounded_each
from svdllm.compression.session import Run
from svdllm.compression.stages import stages_of
from svdllm.compression.subject import Subject
from svdllm.data import TokenWindows
from svdllm.models.chosen import Forms
from svdllm.models.experts_on_disk import give_back, on_disk
from svdllm.models.loaded_weights import tensors_replaced
from svdllm.models.read import read
from svdllm.models.structure import Target, bias_of, weight_of, weights_by_name
from svdllm.models.walk import Block, Walk


def refit(
    run: Run, subject: Subject, windows: TokenWindows | None, analysis: Analysis, plan: Plan
) -> FinalFactors | None:
    """Fits the factors of one plan to the inputs that the compressed model makes itself.

    None where the recipe does not ask for it: the factors are slices of the analysis then.
    """
    if run.recipe.calibration_mode == "dense":
        return None
    assert windows is not None
    ids = windows.ids[: run.recipe.sequential_samples]
    walk = subject.walk(ids, run.recipe, run.spill_file(plan), run.scratch(plan), run.processes)
    walk.two_streams = True
    finals = FinalFactors(run.analysis_folder / f"sequential-{digest_of(run.recipe, plan.forms)}")
    Sequential(
        walk=walk,
        forms=plan.forms,
        recipe=run.recipe,
        analysis=analysis,
        finals=finals,
        num_tokens=ids.numel(),
        num_dense_tokens=windows.num_tokens,
        reporter=run.reporter,
    ).run()
    return finals


@dataclass(frozen=True, kw_only=True)
class Sequential:
    """The walk of a sequential calibration for one allocation. Every finished block is a file in ``finals``."""

    walk: Walk
    forms: Forms
    recipe: Recipe
    analysis: Analysis
    finals: FinalFactors
    num_tokens: int
    num_dense_tokens: int  # of the dense calibration, whose Grams are mixed in
    reporter: Reporter

    def run(self) -> None:
        blocks, processes = self.walk.structure.blocks, self.walk.processes
        self.finals.folder.mkdir(parents=True, exist_ok=True)
        done = processes.from_first(lambda: list(map(self.finals.is_done, range(len(blocks)))))
        if all(done):
            return
        with self.reporter.stage("sequential", len(blocks)):
            for block in self.walk.blocks():
                advanced = not done[block.index] and self._compress(block)
                processes.wait()  # for the file
                self._advance(block, dense=not advanced)
                self.reporter.advance(block.index + 1, len(blocks))
        self.walk.close()

    def _compress(self, block: Block) -> bool:
        """Fits the targets of a block; whether the dense stream has advanced through it meanwhile."""
        factors: dict[str, dict[str, Tensor]] = {}
        replaced: dict[str, Tensor] = {}  # parameters of the targets that are compressed already
        stored_in = torch.float64 if self.walk.dtype == torch.float64 else torch.float32
        stages = stages_of(block)
        advances = [stage is stages[-1] and stage[0].pool is None for stage in stages]
        for stage, advance in zip(stages, advances, strict=True):
            made: dict[str, dict[str, Tensor]] = {}
            for target, products in self._targets_in(block, stage, replaced, advance):
                weight_OI = weight_of(self.walk.skeleton, target)
                if self._keeps_weight(target) and not products.lacks(self.recipe.beta):
                    continue
                tensors = self._fit(target, weight_OI, products)
                if self._corrects_bias(target):
                    means = [total / products.weight for total in (products.dense_sum_I, products.compressed_sum_I)]
                    u_OR, v_RI = tensors["svd_u.weight"], tensors["svd_v.weight"]
                    bias_O = bias_of(self.walk.skeleton, target)
                    corrected_O = corrected_bias(weight_OI, u_OR, v_RI, *means, bias_O=bias_O)
                    tensors["bias"] = corrected_O + products.residual_sum_O / products.weight
                made[target.name] = self._kept(target, {leaf: t.to(stored_in) for leaf, t in tensors.items()})
                give_back(weight_OI)
            everything = self.walk.processes.merged(made)
            for target in stage:
                if target.name in everything:
                    fitted = made.get(target.name) or self._kept(target, everything[target.name])
                    factors[target.name] = fitted
                    replaced |= self._parameters(target, fitted)
        if self.walk.processes.is_first:
            self.finals.write(block.index, factors)
        return any(advances)

    def _targets_in(
        self, block: Block, stage: list[Target], replaced: Mapping[str, Tensor], advance: bool
    ) -> Iterator[tuple[Target, Products]]:
        """Yields the targets of a stage that this process fits, with the products of their inputs.

        Experts without tokens are left out.
        """
        if stage[0].pool is None:
            products, own = self._products(block, stage, replaced, advance), self._own(stage)
            for target in own:
                yield target, products if target is own[-1] else products.cloned()
            return
        for part in parts_of(stage, {target.name: target.full_rank for target in stage}):
            of_experts = expert_products(block, part.targets, replaced)
            found = [target for target in part.targets if target.name in of_experts]
            yield from ((target, of_experts[target.name]) for target in self._own(found))

    def _own(self, targets: list[Target]) -> list[Target]:
        """The targets that this process fits."""
        return [targets[number] for number in self.walk.processes.own(list(map(cost, targets)))]

    def _products(self, block: Block, group: list[Target], replaced: Mapping[str, Tensor], advance: bool) -> Products:
        """The products of a group over all batches of the two streams; of the block's last, the dense one advances."""
        assert self.walk.compressed is not None
        leader = group[0]
        module = self.walk.skeleton.get_submodule(leader.linears[0])
        alone = len(group) == 1 and leader.out_features < leader.in_features
        fitted = (weight_of(self.walk.skeleton, leader), self.recipe.beta) if alone else None
        takes_residual = len(group) == 1 and not pulled_back(group, self.recipe, self.walk.skeleton)
        share = self.recipe.residual_correction if takes_residual else 0
        sums = Sums(leader.in_features, self.walk.device, fitted)
        for numbers in self.walk.text.rounds:
            for number in numbers:
                dense = read(block, module, self.walk.hidden, number, advance=advance)
                with tensors_replaced(self.walk.skeleton, replaced):
                    compressed = read(block, module, self.walk.compressed, number)
                lacking = dense.lacking(compressed) if share else None
                sums.add(dense.inputs, compressed.inputs, None if lacking is None else share * lacking)
            sums.fold(self.walk.processes)
        products = sums.value()
        summed = products.compressed_II, products.difference_II, products.missing_OI
        if not all(bool(product.sum().isfinite()) for product in summed):
            raise NumericalError(f"The inputs of {leader.name} have NaN or infinite values over the calibration text.")
        return products

    def _keeps_weight(self, target: Target) -> bool:
        """Whether a target is a matrix of its own size: dense, or making the inner features of a narrower MLP."""
        chosen = self.forms.get(target.name)
        return chosen is None or (FORMS[chosen.form].of_mlps and not self._is_consumer(target))

    def _corrects_bias(self, target: Target) -> bool:
        return target.bias_corrected and target.name in self.forms

    @staticmethod
    def _is_consumer(target: Target) -> bool:
        return target.inner is not None and target.inner.side == "in"

    def _fit(self, target: Target, weight_OI: Tensor, products: Products) -> dict[str, Tensor]:
        """Fits a target: ``svd_u`` and ``svd_v``, or ``weight`` with zeros for inner features that go; float64.

        The products are changed.
        """
        if self._corrects_bias(target):
            products.centre()
        self._mix_in_dense_gram(target, products)
        products.shrink(self.recipe.shrinkage)
        beta, gram_II, left = self.recipe.beta, products.compressed_II, self.analysis.left_metric(target)
        left = None if left is None else left.to(self.walk.device)
        missing_OI = None if isinstance(left, Pullback) else products.missing(weight_OI, beta)
        rooted = missing_OI is not None and self._needs_root_only(target)
        try:
            if not self._keeps_weight(target) and FORMS[self.forms[target.name].form].of_mlps:
                return {"weight": self._narrowed(target, weight_OI, products, missing_OI)}
            if isinstance(left, Pullback):
                star_OI, left = anchored_with_pullback(weight_OI, gram_II, products.missing(None, beta), left)
            else:
                star_OI = anchored(weight_OI, gram_II, missing_OI, overwrite=rooted)
            if self._keeps_weight(target):
                return {"weight": star_OI}
            chosen = self.forms[target.name]
            if (bits := bits_of(chosen)) is not None:
                dtype = self._source_dtype(target)
                (rounded,) = rounded_each(target, star_OI.float(), gram_II, [bits], dtype, chosen.size)
                return fitted_rounding(rounded)
            if FORMS[chosen.form].curve == "correction":
                assert not isinstance(left, Pullback)
                dtype, form = self._source_dtype(target), FORMS[chosen.form]
                return corrected_target(target, star_OI.float(), gram_II, left, form, chosen.size, dtype)
            measured_OI, metric_II = star_OI, gram_II
            if rooted:
                measured_OI, metric_II = star_OI @ gram_II.mT, None
                products.free_gram()
            left = left_metric_of(target, measured_OI, metric_II, left)
            spectrum = output_spectrum(measured_OI, metric_II, chosen.size, left=left)
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise NumericalError(f"The spectrum of {target.name} did not converge: {error}") from error
        u_OR, v_RI = factorise(star_OI, spectrum, chosen.size)
        return {"svd_u.weight": u_OR, "svd_v.weight": v_RI}

    def _narrowed(self, target: Target, weight_OI: Tensor, products: Products, missing_OI: Tensor | None) -> Tensor:
        order_I = self.analysis.inner_order(target)
        assert order_I is not None
        kept_W = order_I[: self.forms[target.name].size].to(weight_OI.device)
        safe = self.recipe.shrinkage > 0  # S' is positive definite, whatever is rounded
        fit_OW = narrowed_anchored(weight_OI, products.compressed_II, kept_W, missing_OI, overwrite=safe)
        products.free_gram()
        return with_zeros(fit_OW, kept_W, len(order_I))

    def _needs_root_only(self, target: Target) -> bool:
        """Whether a target is measured by ``W* L`` alone, where ``S' = L L^T``; a tall one would lose digits so."""
        is_wide = target.out_features <= target.in_features
        return self._keeps_weight(target) or (is_wide and FORMS[self.forms[target.name].form].curve == "truncation")

    def _source_dtype(self, target: Target) -> torch.dtype:
        return self.walk.weights.shape_and_dtype(f"{target.name}.weight")[1]

    def _mix_in_dense_gram(self, target: Target, products: Products) -> None:
        """Mixes in the Gram of the dense calibration, which has seen more tokens: the fit adapts to few ones less."""
        recipe, metric = self.recipe, self.analysis.metric(target)
        if metric is None or recipe.shrinkage == 1 or recipe.bias_correction != self._corrects_bias(target):
            return
        scale = self.num_tokens / self.num_dense_tokens
        share = recipe.sequential_shrinkage
        if target.pool is not None:  # few tokens: more of the Gram that has seen more, and others of the layer
            group = group_tokens(target.in_features)
            share = max(share, group / (products.num_tokens + group))
        products.mix_in(metric.to(self.walk.device), share, scale=scale, shrinkage=recipe.shrinkage)

    def _kept(self, target: Target, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a target, on disk where the weights of experts are."""
        folder = None if target.pool is None else self.walk.scratch
        return {name: on_disk(tensor, folder) for name, tensor in tensors.items()}

    def _parameters(self, target: Target, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters with which a dense linear computes what its factors, or its fitted weight, would."""
        device, dtype = self.walk.device, self.walk.dtype
        parameters = self._kept(target, weights_by_name(target, product_of(tensors).to(device, dtype)))
        if (bias_O := tensors.get("bias")) is not None:
            parts = target.split(bias_O.to(device, dtype)).items()
            parameters |= {f"{name}.bias": values for name, values in parts}
        return parameters

    def _advance(self, block: Block, *, dense: bool) -> None:
        """Carries the compressed stream through a block, and the dense one."""
        assert self.walk.compressed is not None
        replaced: dict[str, Tensor] = {}
        for target in self.walk.structure.block_targets(block.index):
            if tensors := self.finals.of(target):
                replaced |= self._parameters(target, tensors)
        for number in range(len(self.walk.batches)):
            with tensors_replaced(self.walk.skeleton, replaced), torch.no_grad():
                ran = block.run_on(self.walk.compressed, number)
            block.keep(self.walk.compressed, number, ran)
        if dense:
            block.run()
