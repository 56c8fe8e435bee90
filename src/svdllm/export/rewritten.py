"""The tensors of a model whose linears get other forms than the checkpoint stores them in."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from svdllm.checkpoint.tensors import Tensors, loaded_tensors
from svdllm.common.errors import UnsupportedModelError
from svdllm.export.stored_linears import StoredLinears
from svdllm.models.weights import Weights


class Rewritten:
    """The tensors of ``skeleton``, made one at a time from those of a checkpoint.

    Args:
        weights: the tensors of the checkpoint.
        linears: its linears.
        skeleton: the model to write, without data.
        changed: the linears that have another form in ``skeleton``; every other tensor is taken over.
        parts: producer of an MLP -> number of equal parts of its rows that are each filled up with zeros.
    """

    def __init__(
        self,
        weights: Weights,
        linears: StoredLinears,
        skeleton: PreTrainedModel,
        changed: Collection[str],
        parts: Mapping[str, int] | None = None,
    ):
        self._weights, self._linears, self._skeleton = weights, linears, skeleton
        self._changed, self._parts = frozenset(changed), parts or {}
        tensors = loaded_tensors(skeleton, torch.float32)
        self.layout: Tensors = {name: (shape, self._dtype(name)) for name, (shape, _) in tensors.items()}

    def require_places(self) -> None:
        """Raises UnsupportedModelError if a linear has a bias that transformers would drop."""
        dropped = sorted(
            f"{name}.bias"
            for name in self._changed
            if f"{name}.bias" not in self.layout
            and f"{name}.svd_u.bias" not in self.layout
            and self._linears.bias_name(name)
        )
        if dropped:
            raise UnsupportedModelError(
                f"{type(self._skeleton).__name__} has no place for {len(dropped)} biases that --bias-correction added, "
                f"or flap, such as {dropped[0]}: a plain model would compute without them. Use the checkpoint as it "
                "is, or compress without --bias-correction."
            )

    def get(self, name: str) -> Tensor:
        owner = self._changed_owner(name)
        if owner is None:
            return self._weights.get(name)
        shape, dtype = self.layout[name]
        leaf = name.removeprefix(f"{owner}.")
        if stored_bias := self._bias_of(name, owner):
            return filled_up(self._weights.get(stored_bias), shape, self._parts.get(owner, 1))
        if leaf in ("svd_u.weight", "svd_v.weight"):
            u, v = self._linears.pair(owner)
            return u if leaf == "svd_u.weight" else v
        is_conv1d = isinstance(self._skeleton.get_submodule(owner), Conv1D)  # its weight is stored as (in, out)
        matrix_OI = self._linears.matrix(owner)
        matrix_OI = filled_up(matrix_OI, shape[::-1] if is_conv1d else shape, self._parts.get(owner, 1))
        return (matrix_OI.mT if is_conv1d else matrix_OI).to(dtype)

    def _changed_owner(self, name: str) -> str | None:
        owner = self._linears.owner(name)
        return owner if owner in self._changed else None

    def _dtype(self, name: str) -> torch.dtype:
        owner = self._changed_owner(name)
        if owner is None:
            return self._weights.shape_and_dtype(name)[1]
        stored_bias = self._bias_of(name, owner)
        return self._weights.shape_and_dtype(stored_bias)[1] if stored_bias else self._linears.weight_dtype(owner)

    def _bias_of(self, name: str, owner: str) -> str | None:
        """The stored bias that a tensor of a changed linear is made of; None if the tensor is a weight."""
        return self._linears.bias_name(owner) if name.endswith(".bias") else None


def filled_up(tensor: Tensor, shape: tuple[int, ...], parts: int) -> Tensor:
    """Appends zeros up to a shape: along the first dimension to each of ``parts`` equal parts, as a fused gate and up.

    In a narrower MLP the inner features that zeros add reach the output through zeros only, whatever the activation.
    """
    if tuple(tensor.shape) == shape:
        return tensor
    stored = tensor.unflatten(0, (parts, -1))
    result = tensor.new_zeros(parts, shape[0] // parts, *shape[1:])
    result[(slice(None), *map(slice, stored.shape[1:]))] = stored
    return result.flatten(0, 1)
