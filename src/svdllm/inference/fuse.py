"""Rearranges the factors of a loaded model for faster inference. Checkpoints are not affected.

1. Joined: q, k and v read one tensor, and so do gate and up. ``V_q x``, ``V_k x`` and ``V_v x`` become one product with
   the rows of all three, which starts once and is large enough to keep a device busy.
2. Aligned: ranks are padded with zeros to multiples of 16, which makes products several per cent faster.
3. Laid out: in full precision on a CPU, ``U`` is stored column by column. ``U z`` for one token then adds long columns,
   instead of many short products of rows.

Each step was measured to help (docs/speed.md). Parameters keep their shapes and names, as views of the padded tensors.
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
    """Computes ``V x`` for several linears at once.

    The first linear that is called with a tensor computes the product for all. The others are called with the same
    tensor (the same object, not an equal one) and take their rows.
    """

    def __init__(self, linears: Sequence[nn.Module]):
        self.linears = list(linears)
        self.weight: Tensor | None = None  # None: to be joined from the parameters
        self._given: Tensor | None = None
        self._parts: list[Tensor | None] = []

    def part(self, index: int, x: Tensor) -> Tensor:
        """The product of linear ``index`` with ``x`` (..., in_features): (..., aligned rank)."""
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
        """Joins the factors into one weight, and makes the parameters views of it."""
        places: dict[nn.Linear, slice] = {}  # two linears may share one first factor
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
    """A linear with a shared product. Moving or casting it parts the weights, which are then joined again."""

    shared: SharedProduct
    index: int

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.shared.weight = None
        return super()._apply(fn, recurse)


class FusedLowRankLinear(_Member, LowRankLinear):
    """``U (V x) + b``, where ``V x`` comes from a shared product."""

    u_OR: Tensor  # padded with zero columns to the aligned rank

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
    """A dense linear that shares a product with the first factors of its group."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return super().forward(x)
        return self.shared.part(self.index, x)


def fuse_factors(model: nn.Module) -> int:
    """Joins, aligns and lays out the factors of a low-rank model, in place.

    Linears that read the same tensor, found in one forward pass over two tokens, become one product, together with
    dense linears without a bias in the same group. Results differ by rounding only. Weights keep their names and
    shapes, and may be saved, moved, cast and loaded into. With gradients, the separate products are used.

    Returns:
        The number of groups of linears that became one product.

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
    """Whether a module is a plain linear in memory: not quantised, sharded, adapted or offloaded."""
    return (
        type(module) is nn.Linear
        and type(module.weight.data) is Tensor
        and module.weight.device.type != "meta"
        and not hasattr(module, "_hf_hook")
    )


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the low-rank linears, and the dense linears without a bias, with their names."""
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
    """Pads ``U`` with zero columns, laid out for its device and dtype; the parameter becomes a view of the result."""
    out_features, rank = weight_OR.shape
    by_column = weight_OR.device.type == "cpu" and weight_OR.dtype in (torch.float32, torch.float64)
    if by_column:
        filled_OR = weight_OR.new_zeros(_aligned(rank), out_features).mT
    else:
        filled_OR = weight_OR.new_zeros(out_features, _aligned(rank))
    _move(weight_OR, filled_OR[:, :rank])
    return filled_OR


def _move(parameter: Tensor, place: Tensor) -> None:
    """Copies a parameter into a view of another tensor, and makes it that view."""
    place.copy_(parameter)
    parameter.data = place
