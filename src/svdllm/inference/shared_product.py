"""Computes at once what several linears make of one tensor.

The linears are dense (without a bias), pairs, or packed. Their parameters keep names and shapes, as views of joined and
padded tensors: ranks are padded with zeros to multiples of 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from svdllm.inference.packed import expanded_u, is_packed
from svdllm.inference.products import (
    BufferedProduct,
    GatheredInputs,
    JoinedProduct,
    OrderedInputs,
    Product,
    is_ordered,
    second_factor,
)
from svdllm.models.low_rank import FACTORED


class SharedProduct:
    """Computes the parts of several linears for one tensor.

    The part of a dense linear, or of one packed by rows, is its output without bias. That of any other is its latent.
    The first linear that is called with a tensor computes the parts of all. The others are called with the same tensor
    (the same object, not an equal one) and take theirs.
    """

    def __init__(self, linears: Sequence[nn.Module]):
        self.linears = list(linears)
        self.expanded: set[int] = set()  # linears packed by rows whose part is their latent nevertheless
        self.second: list[Tensor | None] = []  # U (out, aligned rank) of linears whose part is a latent
        self._products: list[Product] = []  # empty: to be made from the parameters
        self._given: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def part(self, index: int, x: Tensor) -> Tensor:
        """The part of linear ``index`` for ``x`` (..., in_features): (tokens, features)."""
        if not self._products:
            self.join()
        if len(self.linears) == 1:
            return self._all_parts(x)[index]
        if self._given is not x or index not in self._parts:
            self._given, self._parts = x, self._all_parts(x)
        part = self._parts.pop(index)
        if not self._parts:
            self._given = None
        return part

    def _all_parts(self, x: Tensor) -> dict[int, Tensor]:
        x_TI = x.reshape(-1, x.shape[-1])
        return {index: part for product in self._products for index, part in product(x_TI)}

    @torch.no_grad()
    def join(self) -> None:
        """Makes the products from the parameters, which become views of the joined tensors."""
        ordered, gathered, by_rows, plain = {}, {}, {}, {}
        for index, linear in enumerate(self.linears):
            if is_packed(linear, "columns"):
                (ordered if is_ordered(linear) else gathered)[index] = linear
            else:
                (by_rows if is_packed(linear, "rows") and index not in self.expanded else plain)[index] = linear
        self._products = []
        if ordered:
            self._products.append(OrderedInputs(ordered))
        if gathered:
            self._products.append(GatheredInputs(gathered))
        if by_rows:
            self._products.append(BufferedProduct(plain, by_rows))
        elif plain:
            self._products.append(JoinedProduct(plain))
        self.second = [
            second_factor(expanded_u(linear)) if isinstance(linear, FACTORED) and index not in by_rows else None
            for index, linear in enumerate(self.linears)
        ]

    def give_latent(self, index: int, wanted: bool) -> None:
        """Whether the part of linear ``index`` shall be its latent even if it is packed by rows."""
        (self.expanded.add if wanted else self.expanded.discard)(index)
        self.forget()

    def forget(self) -> None:
        """Lets the next call join the parameters again, after they were moved, cast or loaded into."""
        self._products = []

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedProduct:
        copied = memo[id(self)] = SharedProduct([])
        copied.linears = deepcopy(self.linears, memo)
        copied.expanded = set(self.expanded)
        return copied
