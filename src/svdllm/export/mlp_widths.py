"""The plain model that is as wide as the widest MLP of a checkpoint with narrower MLPs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from svdllm.common.errors import UnsupportedModelError
from svdllm.models.linears import linear_shape, linears_of
from svdllm.models.skeleton import build_skeleton
from svdllm.models.structure import Mlp


@dataclass(frozen=True)
class Plain:
    """A plain model of the base family, without data, and its MLPs that can be narrower."""

    config: PreTrainedConfig
    skeleton: PreTrainedModel
    mlps: Sequence[Mlp] = ()

    @property
    def parts(self) -> dict[str, int]:
        """The number of inner matrices that each producer stacks: 2 for a fused gate and up, else 1."""
        rows = {name: linear_shape(module)[0] for name, module in linears_of(self.skeleton)}
        return {name: rows[name] // mlp.width for mlp in self.mlps for name in mlp.producers}

    @property
    def filled_parts(self) -> dict[str, int]:
        """The number of equal parts of each producer's rows behind which further inner features lie."""
        interleaved = {name for mlp in self.mlps if mlp.interleaved for name in mlp.producers}
        return {name: 1 if name in interleaved else parts for name, parts in self.parts.items()}

    def stored_widths(self, forms: Mapping[str, Mapping[str, Any]]) -> list[int]:
        """The width of every MLP in a checkpoint whose linears have these entries in ``config.json``."""
        return [forms.get(mlp.consumer, {}).get("in_features", mlp.width) for mlp in self.mlps]

    def as_wide_as(self, forms: Mapping[str, Mapping[str, Any]]) -> Plain:
        """The model whose MLPs are as wide as the widest in a checkpoint; this one if no config describes it."""
        dense = {mlp.width for mlp in self.mlps}
        widest = max(self.stored_widths(forms), default=0)
        if len(dense) != 1 or dense == {widest}:
            return self
        return next((plain for plain in self._with_other_fields(widest) if self._differs_in_width(plain)), self)

    def _with_other_fields(self, width: int) -> Iterator[Plain]:
        """This model with another number in an entry of its config that may be the width.

        Those are the entries with its value, and then those without one (``n_inner`` of GPT-2).
        """
        entries = self.config.to_dict()
        equal = [name for name, value in entries.items() if value == self.mlps[0].width]
        for name in equal + [name for name, value in entries.items() if value is None]:
            config = copy.deepcopy(self.config)
            try:
                setattr(config, name, width)
                skeleton = build_skeleton(config)
            except (ValueError, TypeError, AttributeError, StrictDataclassError, UnsupportedModelError):
                continue  # not an entry for numbers
            yield Plain(config, skeleton, [replace(mlp, width=width) for mlp in self.mlps])

    def _differs_in_width(self, other: Plain) -> bool:
        """Whether another model differs from this one in the width of its MLPs and in nothing else."""
        wanted, parts = _shapes(self.skeleton), self.parts
        for mlp in other.mlps:
            wanted |= {name: (parts[name] * mlp.width, wanted[name][1]) for name in mlp.producers}
            wanted[mlp.consumer] = (wanted[mlp.consumer][0], mlp.width)
        return _shapes(other.skeleton) == wanted


def _shapes(skeleton: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """``(out, in)`` of every linear, and the shape of every other tensor."""
    linears = {name: linear_shape(module) for name, module in linears_of(skeleton)}
    tensors = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    return {name: shape for name, shape in tensors.items() if name.rpartition(".")[0] not in linears} | linears
