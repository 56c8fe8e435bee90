"""Computes the tensors of a compressed model from source weights and stored bases."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from svdllm.common.errors import NumericalError
from svdllm.common.progress import Reporter
from svdllm.compression.analysis import Analysis, FinalFactors
from svdllm.compression.forms import FORMS, Fitted, bits_of
from svdllm.compression.forms.bits import CODES, SCALES, fitted_rounding, packed_factors
from svdllm.compression.math.linalg import corrected_bias, factorise
from svdllm.compression.math.narrowing import kept_rows
from svdllm.compression.math.pullback import Pullback
from svdllm.compression.rounded_targets import corrected_target, rounded_each
from svdllm.compression.subject import Subject
from svdllm.models.chosen import Chosen, Forms
from svdllm.models.structure import Target

DENSE = Chosen("dense", 0)


class TargetFactors:
    """The tensors of a compressed model by name, computed one target at a time.

    Factors are slices of the bases in ``analysis``, unless ``finals`` has fitted ones.
    """

    def __init__(
        self,
        subject: Subject,
        forms: Forms,
        analysis: Analysis,
        finals: FinalFactors | None,
        device: torch.device,
        reporter: Reporter,
    ):
        structure = subject.structure
        self._weights, self._forms, self._device = subject.weights, forms, device
        self._analysis, self._finals = analysis, finals
        self.targets = {target.name: target for target in structure.stored}
        self._owners = {name: target for target in structure.stored for name in target.linears}
        self._mlps = structure.mlp_targets
        self._made: dict[str, dict[str, dict[str, Tensor]]] = {}  # of one block, by target
        self._orders: dict[str, Tensor] = {}  # of the inputs of the packed linears among them
        self._reporter, self._num_blocks = reporter, len(structure.blocks)

    def get(self, name: str) -> Tensor:
        """A tensor of the compressed model, on the CPU and in the dtype of the source.

        Raises:
            NumericalError: a factor overflows this dtype; names the linear.
        """
        linear = self._linear_of(name)
        target = self._owners.get(linear)
        if target is None or (target.name not in self._forms and self._finals is None and not self._packed_by(target)):
            return self._weights.get(name)
        return self._stored(target)[linear][name[len(linear) + 1 :]]

    def _linear_of(self, name: str) -> str:
        """The linear whose tensor this is, in whatever form; or the module."""
        module = name.rpartition(".")[0]
        return module if module in self._owners else module.rpartition(".")[0]

    def _stored(self, target: Target) -> dict[str, dict[str, Tensor]]:
        """Linear -> name -> tensor of a target in its form."""
        if any(self.targets[name].block != target.block for name in self._made):
            self._made.clear()
            self._orders.clear()
        if target.name not in self._made:
            made = self._in_form(target, self._in_order_of_consumer(target, self._fitted(target)))
            if target.inner is not None and target.inner.side == "in":
                for own in made.values():
                    if "order" in own:
                        self._orders[target.name] = own["order"].long()
                made = {linear: _with_inputs_in_order(tensors) for linear, tensors in made.items()}
            self._made[target.name] = made
            if target.name in self._forms:
                self._reporter.advance(target.block + 1, self._num_blocks)
        return self._made[target.name]

    def _in_form(self, target: Target, fitted: Fitted) -> dict[str, dict[str, Tensor]]:
        chosen = self._forms.get(target.name, DENSE)
        order = self._analysis.inner_order(target) if FORMS[chosen.form].of_mlps else None
        made = FORMS[chosen.form].store(target, fitted, chosen.size, order)
        weight, bias = self._dtypes(target)
        stored = {
            linear: {leaf: _as(tensor, bias if leaf.endswith("bias") else weight) for leaf, tensor in own.items()}
            for linear, own in made.items()
        }
        if (bits := FORMS[chosen.form].factor_bits) is not None:
            stored = {linear: packed_factors(own, bits) for linear, own in stored.items()}
        for linear, own in stored.items():
            for leaf, tensor in own.items():
                if not bool(torch.isfinite(tensor).all()):
                    raise NumericalError(f"{linear}.{leaf} overflows {tensor.dtype}; leave it dense with --ignore.")
        return stored

    def _dtypes(self, target: Target) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes of the weight and the bias in the source; a bias that a correction adds has that of the weight."""
        name = target.linears[0]
        weight = self._weights.get(f"{name}.weight").dtype
        return weight, self._weights.get(f"{name}.bias").dtype if target.has_bias else weight

    def _packed_by(self, target: Target) -> Target | None:
        """The linear that reads the inner features that a target makes, if it wants them in an order of its own."""
        if target.inner is None or target.inner.side == "in":
            return None
        consumer = self._mlps[target.inner.mlp][-1]
        return consumer if FORMS[self._forms.get(consumer.name, DENSE).form].orders_inputs else None

    def _in_order_of_consumer(self, target: Target, fitted: Fitted) -> Fitted:
        """Makes the inner features of an MLP in the order in which the linear that reads them wants them.

        That linear then gathers nothing, and the MLP computes the same.
        """
        consumer = self._packed_by(target)
        if target.inner is None or consumer is None:
            return fitted
        self._stored(consumer)
        order = self._orders[consumer.name]
        rows = kept_rows(order, len(order), target.inner.copies, target.inner.interleaved).to(self._device)
        by_row = ("weight", "svd_u.weight", "bias", CODES, SCALES)
        return {leaf: tensor[rows] if leaf in by_row else tensor for leaf, tensor in fitted.items()}

    def _fitted(self, target: Target) -> Fitted:
        """The factors or the matrix of a target, and its bias; fitted to the compressed stream if it was."""
        biases = [self._weights.get(f"{name}.bias").to(self._device) for name in target.linears if target.has_bias]
        bias = {"bias": torch.cat(biases)} if biases else {}
        if self._finals is not None and not target.vocabulary and (fitted := self._finals.of(target)):
            return bias | {leaf: tensor.to(self._device) for leaf, tensor in fitted.items()}
        stored = [self._weights.get(f"{name}.weight") for name in target.linears]
        weight_OI = target.stacked(stored).to(self._device)
        return bias | self._sliced(target, weight_OI, bias.get("bias"))

    def _sliced(self, target: Target, weight_OI: Tensor, bias_O: Tensor | None) -> dict[str, Tensor]:
        """What the analysis makes of a target: its factors, or the matrix of a narrower MLP, whose width is not cut."""
        chosen = self._forms.get(target.name, DENSE)
        if chosen is DENSE:
            return {"weight": weight_OI}
        if (bits := bits_of(chosen)) is not None:
            metric = None if target.vocabulary else self._analysis.metric(target)
            metric = None if metric is None else metric.to(self._device)
            (rounded,) = rounded_each(target, weight_OI, metric, [bits], weight_OI.dtype, chosen.size)
            return fitted_rounding(rounded)
        if FORMS[chosen.form].curve == "correction":
            right, left = self._analysis.metric(target), self._analysis.left_metric(target)
            assert not isinstance(left, Pullback)
            right, left = (None if metric is None else metric.to(self._device) for metric in (right, left))
            form, dtype = FORMS[chosen.form], weight_OI.dtype
            return corrected_target(target, weight_OI.float(), right, left, form, chosen.size, dtype)
        if FORMS[chosen.form].of_mlps:
            assert target.inner is not None
            if target.inner.side == "out":
                return {"weight": weight_OI}
            narrowing = self._analysis.narrowing(target.block, target.inner.mlp).to(self._device)
            return {"weight": narrowing.consumer(weight_OI, chosen.size)}
        spectrum = self._analysis.spectrum(target).to(self._device)
        u_OR, v_RI = factorise(weight_OI, spectrum, chosen.size)
        factors = {"svd_u.weight": u_OR, "svd_v.weight": v_RI}
        if target.bias_corrected:
            mean_I = self._analysis.mean(target).to(self._device)
            factors["bias"] = corrected_bias(weight_OI, u_OR, v_RI, mean_I, mean_I, bias_O)
        return factors


def _with_inputs_in_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a packed linear whose inputs come in its own order."""
    return {leaf: torch.arange(len(t), dtype=t.dtype) if leaf == "order" else t for leaf, t in tensors.items()}


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
