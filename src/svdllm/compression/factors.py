"""Computes the tensors of a compressed model from source weights and stored bases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from svdllm.common.errors import NumericalError
from svdllm.common.progress import Reporter
from svdllm.compression.analysis import Analysis, FinalFactors
from svdllm.compression.math.linalg import corrected_bias, factorise
from svdllm.compression.subject import Subject
from svdllm.models.structure import Target


class TargetFactors:
    """The tensors of a compressed model by name, computed one target at a time.

    Factors are slices of the bases in ``analysis``, unless ``finals`` has fitted ones.
    """

    def __init__(
        self,
        subject: Subject,
        ranks: Mapping[str, int],
        analysis: Analysis,
        finals: FinalFactors | None,
        device: torch.device,
        reporter: Reporter,
    ):
        structure = subject.structure
        self._weights, self._ranks, self._device = subject.weights, ranks, device
        self._analysis, self._finals = analysis, finals
        self.targets = {target.name: target for target in structure.targets}
        self._owners = {name: target for target in structure.targets for name in target.linears}
        self._made: tuple[str, dict[str, Tensor]] = ("", {})
        self._reporter, self._num_blocks = reporter, len(structure.blocks)

    def get(self, name: str) -> Tensor:
        """A tensor of the compressed model, on the CPU and in the dtype of the source.

        Raises:
            NumericalError: a factor overflows this dtype; names the linear.
        """
        for leaf in ("svd_v.weight", "svd_u.weight", "svd_u.bias"):
            if name.endswith(leaf):
                linear = name.removesuffix(f".{leaf}")
                target = self._owners[linear]
                if leaf == "svd_u.bias" and not target.bias_corrected:
                    return self._weights.get(f"{linear}.bias")
                factor = self._factors_of(target)[leaf]
                return factor if leaf == "svd_v.weight" else target.split(factor)[linear].contiguous()
        return self._refitted(name) if self._finals is not None else self._weights.get(name)

    def _refitted(self, name: str) -> Tensor:
        """A dense tensor: fitted to the compressed stream if it was, else as in the source."""
        linear = name.removesuffix(".weight")
        stored, target = self._weights.get(name), self._owners.get(linear)
        if target is None or self._finals is None or "weight" not in (fitted := self._finals.of(target)):
            return stored
        weight_OI = target.split(fitted["weight"])[linear]
        return _as(weight_OI.mT if target.is_conv1d else weight_OI, stored)

    def _factors_of(self, target: Target) -> dict[str, Tensor]:
        if self._made[0] != target.name:
            stored = [self._weights.get(f"{name}.weight") for name in target.linears]
            made = self._sliced(target, stored) if self._finals is None else self._finals.of(target)
            self._made = (target.name, {leaf: _as(factor, stored[0]) for leaf, factor in made.items()})
            for leaf, factor in self._made[1].items():
                if not bool(torch.isfinite(factor).all()):
                    raise NumericalError(
                        f"{target.name}.{leaf} overflows {stored[0].dtype}; leave it dense with --ignore."
                    )
            self._reporter.advance(target.block + 1, self._num_blocks)
        return self._made[1]

    def _sliced(self, target: Target, stored: Sequence[Tensor]) -> dict[str, Tensor]:
        weight_OI = target.stacked(stored).to(self._device)
        spectrum = self._analysis.spectrum(target).to(self._device)
        u_OR, v_RI = factorise(weight_OI, spectrum, self._ranks[target.name])
        factors = {"svd_u.weight": u_OR, "svd_v.weight": v_RI}
        if target.bias_corrected:
            mean_I = self._analysis.mean(target).to(self._device)
            biases = [self._weights.get(f"{name}.bias") for name in target.linears if target.has_bias]
            bias_O = torch.cat(biases).to(self._device) if biases else None
            factors["svd_u.bias"] = corrected_bias(weight_OI, u_OR, v_RI, mean_I, mean_I, bias_O)
        return factors


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to("cpu", like.dtype).contiguous()
