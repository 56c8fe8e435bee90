"""Reads the compressed linears of a checkpoint as matrices or pairs of factors, whatever form their tensors have."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from svdllm.compression.math.packing import Packed, unpack
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.weights import Weights

FACTORS = (".svd_v", ".svd_u")


class StoredLinears:
    """The linears that ``config.json`` gives a form, read one at a time.

    Args:
        weights: the tensors of the checkpoint.
        skeleton: the model without data.
    """

    def __init__(self, weights: Weights, skeleton: nn.Module, info: LowRankInfo):
        self._weights, self._skeleton, self._info = weights, skeleton, info
        self._stored = frozenset(weights.names())

    def owner(self, tensor: str) -> str | None:
        """The linear that a tensor belongs to; None if that has no form."""
        owner = tensor.rpartition(".")[0]
        for factor in FACTORS:
            owner = owner.removesuffix(factor)
        return owner if owner in self._info.forms else None

    def weight_dtype(self, name: str) -> torch.dtype:
        weight = f"{name}.svd_u.weight" if self._is_factorised(name) else f"{name}.weight"
        return self._weights.shape_and_dtype(weight)[1]

    def bias_name(self, name: str) -> str | None:
        """The name of the stored bias (``out``) of a linear, or None if it has none."""
        return next((bias for bias in (f"{name}.bias", f"{name}.svd_u.bias") if bias in self._stored), None)

    def matrix(self, name: str) -> Tensor:
        """The matrix (``out x in``) of a linear: in float64 where it is a product, else as it is stored."""
        if self._is_factorised(name):
            u_OR, v_RI = self.pair(name)
            return u_OR.double() @ v_RI.double()
        weight = self._weights.get(f"{name}.weight")
        return weight.mT if isinstance(self._skeleton.get_submodule(name), Conv1D) else weight

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """The factors U (``out x rank``) and V (``rank x in``) of a linear that is a pair or packed.

        Those of a packed linear contain an identity, so that their product is exactly what the packed linear computes.
        """
        first = self._info.shared_factors.get(name, name)
        u, v = self._weights.get(f"{name}.svd_u.weight"), self._weights.get(f"{first}.svd_v.weight")
        entry = self._info.forms[name]
        if entry["form"] != "packed":
            return u, v
        return unpack(Packed(svd_v=v, svd_u=u, order=self._weights.get(f"{name}.order")), entry["side"])

    def _is_factorised(self, name: str) -> bool:
        return "rank" in self._info.forms[name]
