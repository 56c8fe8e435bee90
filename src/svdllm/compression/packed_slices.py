"""Packs the pairs of a smaller size that is cut from an elastic checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from svdllm.checkpoint.elastic import SlicedTensors
from svdllm.compression.forms import FORMS
from svdllm.models.chosen import Forms
from svdllm.models.structure import Target


class PackedSlices:
    """The tensors of a smaller size with packed linears, made of the pairs of this size."""

    def __init__(self, pairs: SlicedTensors, targets: Sequence[Target], forms: Forms):
        self._pairs, self._forms = pairs, forms
        self._packed = {t.name: t for t in targets if t.name in forms and forms[t.name].form == "packed"}
        self._made: tuple[str, dict[str, Tensor]] = ("", {})

    def get(self, name: str) -> Tensor:
        module = name.rpartition(".")[0]
        target = self._packed.get(module) or self._packed.get(module.rpartition(".")[0])
        if target is None:
            return self._pairs.get(name)
        if self._made[0] != target.name:
            chosen, leaves = self._forms[target.name], ("svd_u.weight", "svd_v.weight")
            fitted = {leaf: self._pairs.get(f"{target.name}.{leaf}") for leaf in leaves}
            if target.has_bias:
                fitted["bias"] = self._pairs.get(f"{target.name}.svd_u.bias")
            self._made = (target.name, FORMS[chosen.form].store(target, fitted, chosen.size, None)[target.name])
        return self._made[1][name.removeprefix(f"{target.name}.")]
