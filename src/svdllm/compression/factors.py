"""Computes the tensors of a compressed model from source weights and stored bases."""

from __future__ import annotations

import torch
from torch import Tensor

from svdllm.common.errors import NumericalError
from svdllm.common.progress import Reporter
from svdllm.compression.analysis import Analysis, FinalFactors
from svdllm.compression.forms import FORMS, Fitted
from svdllm.compression.math.linalg import corrected_bias, factorise
from svdllm.compression.math.narrowing import narrowed_weight
from svdllm.compression.subject import Subject
from svdllm.models.chosen import Forms
from svdllm.models.structure import Target


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
        self.targets = {target.name: target for target in structure.targets}
        self._owners = {name: target for target in structure.targets for name in target.linears}
        self._made: tuple[str, dict[str, dict[str, Tensor]]] = ("", {})
        self._reporter, self._num_blocks = reporter, len(structure.blocks)

    def get(self, name: str) -> Tensor:
        """A tensor of the compressed model, on the CPU and in the dtype of the source.

        Raises:
            NumericalError: a factor overflows this dtype; names the linear.
        """
        linear = self._linear_of(name)
        target = self._owners.get(linear)
        if target is None:
            return self._weights.get(name)
        if target.name in self._forms:
            return self._stored(target)[linear][name.removeprefix(f"{linear}.")]
        fitted = {} if self._finals is None else self._finals.of(target)
        if "weight" not in fitted or not name.endswith(".weight"):
            return self._weights.get(name)
        stored = FORMS["dense"].store(target, fitted, 0, None)
        return _as(stored[linear]["weight"], self._weights.get(name))

    def _linear_of(self, name: str) -> str:
        """The linear whose tensor this is, in whatever form; or the module."""
        module = name.rpartition(".")[0]
        return module if module in self._owners else module.rpartition(".")[0]

    def _stored(self, target: Target) -> dict[str, dict[str, Tensor]]:
        """Linear -> name -> tensor of a compressed target."""
        if self._made[0] != target.name:
            chosen, dense = self._forms[target.name], self._weights.get(f"{target.linears[0]}.weight")
            order = self._analysis.inner_order(target) if FORMS[chosen.form].of_mlps else None
            made = FORMS[chosen.form].store(target, self._fitted(target), chosen.size, order)
            stored = {
                linear: {leaf: _as(tensor, dense) for leaf, tensor in own.items()} for linear, own in made.items()
            }
            for linear, own in stored.items():
                for leaf, tensor in own.items():
                    if not bool(torch.isfinite(tensor).all()):
                        raise NumericalError(f"{linear}.{leaf} overflows {dense.dtype}; leave it dense with --ignore.")
            self._made = (target.name, stored)
            self._reporter.advance(target.block + 1, self._num_blocks)
        return self._made[1]

    def _fitted(self, target: Target) -> Fitted:
        """The factors or the matrix of a target, and its bias; fitted to the compressed stream if it was."""
        biases = [self._weights.get(f"{name}.bias").to(self._device) for name in target.linears if target.has_bias]
        bias = {"bias": torch.cat(biases)} if biases else {}
        if self._finals is not None and (fitted := self._finals.of(target)):
            return bias | {leaf: tensor.to(self._device) for leaf, tensor in fitted.items()}
        stored = [self._weights.get(f"{name}.weight") for name in target.linears]
        weight_OI = target.stacked(stored).to(self._device)
        return bias | self._sliced(target, weight_OI, bias.get("bias"))

    def _sliced(self, target: Target, weight_OI: Tensor, bias_O: Tensor | None) -> dict[str, Tensor]:
        """What the analysis makes of a target: its factors, or the matrix of a narrower MLP, whose width is not cut."""
        chosen = self._forms[target.name]
        if FORMS[chosen.form].of_mlps:
            assert target.inner is not None
            if target.inner.side == "out":
                return {"weight": weight_OI}
            narrowing = self._analysis.narrowing(target.block, target.inner.mlp).to(device=self._device)
            return {"weight": narrowed_weight(weight_OI, narrowing, chosen.size)}
        spectrum = self._analysis.spectrum(target).to(self._device)
        u_OR, v_RI = factorise(weight_OI, spectrum, chosen.size)
        factors = {"svd_u.weight": u_OR, "svd_v.weight": v_RI}
        if target.bias_corrected:
            mean_I = self._analysis.mean(target).to(self._device)
            factors["bias"] = corrected_bias(weight_OI, u_OR, v_RI, mean_I, mean_I, bias_O)
        return factors


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to("cpu", like.dtype if tensor.is_floating_point() else None).contiguous()
