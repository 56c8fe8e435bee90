"""The factors as products like them best, for inference: joined, aligned and laid out; what is saved stays as it is.

1. q, k and v read one tensor, and so do gate and up: ``V_q x``, ``V_k x`` and ``V_v x`` are one product with the rows of all
   three, which starts once and is large enough to keep a device busy.
2. Ranks are filled up with zeros to multiples of 16, which products are several per cent faster with.
3. In full precision on a CPU, ``U`` is kept column by column: ``U z`` for one token then adds up long columns in place of
   many short products of rows.

Each was measured to help (docs/speed.md). Parameters become views of what is computed with, of the same shapes and names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdllm.models.hooks import input_groups
from svdllm.models.low_rank import LowRankLinear

ALIGNMENT = 16


class SharedProduct:
    """``V x`` for several linears at once, handed out linear by linear.

    The first that is called with a tensor computes the product for all; the others are called with the same tensor (the
    same object, not an equal one) and take their rows.
    """

    def __init__(self, linears: Sequence[nn.Module]):
        self.linears = list(linears)
        self.weight: Tensor | None = None  # None: to be put together from the parameters
        self._given: Tensor | None = None
        self._parts: list[Tensor | None] = []

    def part(self, index: int, x: Tensor) -> Tensor:
        """The product with ``x`` (..., in_features) of linear ``index``, as wide as its rank filled up with zeros."""
        if self.weight is None:
            self.join()
        assert self.weight is not None
        if len(self.linears) == 1:
            return F.linear(x, self.weight)
        if self._given is not x or self._parts[index] is None:
            product = F.linear(x, self.weight)
            self._given, self._parts = x, [product[..., rows] for rows in self.rows]
        part, self._parts[index] = self._parts[index], None
        assert part is not None
        if all(other is None for other in self._parts):
            self._given = None
        return part

    @torch.no_grad()
    def join(self) -> None:
        """Puts the factors together; the parameters are parts of the result from then on."""
        places: dict[nn.Linear, slice] = {}  # two linears may have one first factor
        stop = 0
        for linear in self.linears:
            first = _first(linear)
            if first not in places:
                width = _aligned(first.out_features) if isinstance(linear, LowRankLinear) else first.out_features
                places[first] = slice(stop, stop + width)
                stop += width
        self.rows = [places[_first(linear)] for linear in self.linears]
        self.weight = _first(self.linears[0]).weight.new_zeros(stop, _first(self.linears[0]).in_features)
        for first, rows in places.items():
            _move(first.weight, self.weight[rows][: first.out_features])
        for linear in self.linears:
            if isinstance(linear, FusedLowRankLinear):
                linear.__dict__["u_OR"] = _filled_up(linear.svd_u.weight)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedProduct:
        copied = memo[id(self)] = SharedProduct([])
        copied.linears = deepcopy(self.linears, memo)
        return copied


class _Member(nn.Module):
    """Linears are moved and cast one by one, which parts their weights."""

    shared: SharedProduct
    index: int

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.shared.weight = None
        return super()._apply(fn, recurse)


class FusedLowRankLinear(_Member, LowRankLinear):
    """``U (V x) + b`` with ``V x`` out of a product that others take part in."""

    u_OR: Tensor  # with zero columns up to the aligned rank

    def latent(self, x: Tensor) -> Tensor:
        """``V x`` (..., rank)."""
        if torch.is_grad_enabled() and self.svd_v.weight.requires_grad:
            return self.svd_v(x)
        return self.shared.part(self.index, x)[..., : self.svd_v.out_features]

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (self.svd_v.weight.requires_grad or self.svd_u.weight.requires_grad):
            return super().forward(x)
        latent = self.shared.part(self.index, x)
        return F.linear(latent, self.u_OR, self.svd_u.bias)


class FusedLinear(_Member, nn.Linear):
    """A linear left dense whose product is one with the first factors of its group."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return super().forward(x)
        return self.shared.part(self.index, x)


def fuse_factors(model: nn.Module) -> int:
    """Joins, aligns and lays out the factors of a low-rank model, in place. Returns how many products became one.

    Linears that read the same tensor, seen in one forward pass over two tokens, become one product; those without a bias
    that were left dense beside factored ones take part. Results differ from the ordinary ones by rounding. Weights keep
    their names and shapes and may be saved, moved, cast and loaded into. With gradients the ordinary products are used.

    Raises:
        UnsupportedModelError: a linear does not always share its input with the same others.
    """
    linears = dict(_linears(model))
    if not any(isinstance(linear, LowRankLinear) for linear in linears.values()):
        return 0
    groups: dict[str, list[nn.Module]] = {}
    for name, leader in _groups(model, list(linears.items())).items():
        groups.setdefault(leader, []).append(linears[name])
    factored = [group for group in groups.values() if any(isinstance(linear, LowRankLinear) for linear in group)]
    for group in factored:
        shared = SharedProduct(group)
        for index, linear in enumerate(group):
            kind: Any = FusedLowRankLinear if isinstance(linear, LowRankLinear) else FusedLinear
            linear.__class__ = kind
            linear.__dict__.update(shared=shared, index=index)
        shared.join()
    return sum(len(group) > 1 for group in factored)


def is_plain(module: nn.Module) -> bool:
    """A linear of numbers in memory: not quantised, sharded, adapted or offloaded."""
    return (
        type(module) is nn.Linear
        and type(module.weight.data) is Tensor
        and module.weight.device.type != "meta"
        and not hasattr(module, "_hf_hook")
    )


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Low-rank linears, and ordinary ones without a bias that are no part of one."""
    factors = {part for module in model.modules() if isinstance(module, LowRankLinear) for part in module.children()}
    for name, module in model.named_modules():
        if (type(module) is LowRankLinear and is_plain(module.svd_v) and is_plain(module.svd_u)) or (
            module not in factors and is_plain(module) and module.bias is None
        ):
            yield name, module


def _groups(model: nn.Module, linears: list[tuple[str, nn.Module]]) -> dict[str, str]:
    device = next(model.parameters()).device
    with input_groups(linears) as (groups, _), torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    return groups


def _first(linear: Any) -> nn.Linear:
    return linear.svd_v if isinstance(linear, LowRankLinear) else linear


def _aligned(rank: int) -> int:
    return -(-rank // ALIGNMENT) * ALIGNMENT


def _filled_up(weight_OR: Tensor) -> Tensor:
    """``U`` with zero columns up to the aligned rank, laid out for its device and dtype; the parameter is part of it."""
    out_features, rank = weight_OR.shape
    by_column = weight_OR.device.type == "cpu" and weight_OR.dtype in (torch.float32, torch.float64)
    if by_column:
        filled_OR = weight_OR.new_zeros(_aligned(rank), out_features).mT
    else:
        filled_OR = weight_OR.new_zeros(out_features, _aligned(rank))
    _move(weight_OR, filled_OR[:, :rank])
    return filled_OR


def _move(parameter: Tensor, place: Tensor) -> None:
    """Copies a parameter to where it is a view of what is computed with."""
    place.copy_(parameter)
    parameter.data = place
