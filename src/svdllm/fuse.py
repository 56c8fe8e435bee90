"""One product for the first factors of linears that read the same tensor, for inference.

q, k and v read one tensor, and so do gate and up: ``V_q x``, ``V_k x`` and ``V_v x`` are one product with the rows of all
three, which is read once, starts once and is large enough to keep a device busy. Parameters, their names and what is
saved stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdllm.modeling import LowRankLinear
from svdllm.structure import input_groups


class SharedProduct:
    """``W x`` for the rows of several matrices at once, handed out matrix by matrix.

    The first member that is called with a tensor computes the product for all; the others are called with the same
    tensor (the same object, not an equal one) and take their rows.
    """

    def __init__(self, members: list[nn.Linear]):
        self.members = members
        self.rows = [member.out_features for member in members]
        self.weight: Tensor | None = None
        self._given: Tensor | None = None
        self._parts: list[Tensor | None] = []

    def part(self, index: int, x: Tensor) -> Tensor:
        """Rows of member ``index`` of the product with ``x`` (..., in_features)."""
        if self.weight is None:
            self.join()
        assert self.weight is not None
        if self._given is not x or self._parts[index] is None:
            self._given, self._parts = x, list(F.linear(x, self.weight).split(self.rows, dim=-1))
        part, self._parts[index] = self._parts[index], None
        assert part is not None
        if all(other is None for other in self._parts):
            self._given = None
        return part

    @torch.no_grad()
    def join(self) -> None:
        """Puts the members' weights below each other in one matrix, of which they are parts from then on."""
        self.weight = torch.cat([member.weight for member in self.members])
        for member, rows in zip(self.members, self.weight.split(self.rows), strict=True):
            member.weight.data = rows

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedProduct:
        copied = memo[id(self)] = SharedProduct([])
        copied.members, copied.rows = deepcopy(self.members, memo), list(self.rows)
        return copied


class _Member(nn.Module):
    """What the two kinds of members have in common: they are moved and cast one by one, which parts their weights."""

    shared: SharedProduct
    index: int

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.shared.weight = None
        return super()._apply(fn, recurse)


class FusedLowRankLinear(_Member, LowRankLinear):
    """``U (V x) + b`` with ``V x`` out of a product that others take part in."""

    def latent(self, x: Tensor) -> Tensor:
        """``V x`` (..., rank)."""
        if torch.is_grad_enabled() and self.svd_v.weight.requires_grad:
            return self.svd_v(x)
        return self.shared.part(self.index, x)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.latent(x), self.svd_u.weight, self.svd_u.bias)


class FusedLinear(_Member, nn.Linear):
    """A linear left dense whose product is one with the first factors of its group."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return super().forward(x)
        return self.shared.part(self.index, x)


def fuse_first_factors(model: nn.Module) -> int:
    """Makes one product of the first factors of every group, in place. Returns the number of groups.

    A group is what reads the same tensor, seen in one forward pass over two tokens; linears without a bias that were
    left dense beside factored ones take part. The results differ from the ordinary ones by rounding. Weights keep
    their names and may be saved, moved, cast and loaded into. With gradients the ordinary products are used.

    Raises:
        UnsupportedModelError: a linear does not always share its input with the same others.
    """
    linears = dict(_linears(model))
    if not any(isinstance(linear, LowRankLinear) for linear in linears.values()):
        return 0
    first_factors = {name: getattr(linear, "svd_v", linear) for name, linear in linears.items()}
    groups: dict[str, list[str]] = {}
    for name, leader in _groups(model, list(linears.items())).items():
        groups.setdefault(leader, []).append(name)
    fused = [
        names
        for names in groups.values()
        if len(names) > 1 and any(isinstance(linears[name], LowRankLinear) for name in names)
    ]
    for names in fused:
        shared = SharedProduct([first_factors[name] for name in names])
        shared.join()
        for index, name in enumerate(names):
            linear = linears[name]
            linear.__class__ = FusedLowRankLinear if isinstance(linear, LowRankLinear) else FusedLinear
            linear.__dict__.update(shared=shared, index=index)
    return len(fused)


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Low-rank linears, and ordinary ones without a bias that are no part of one."""
    parts = {part for module in model.modules() if isinstance(module, LowRankLinear) for part in module.children()}
    for name, module in model.named_modules():
        if (type(module) is LowRankLinear and is_plain(module.svd_v)) or (
            module not in parts and is_plain(module) and module.bias is None
        ):
            yield name, module


def is_plain(module: nn.Module) -> bool:
    """A linear of numbers in memory: not quantised, sharded, adapted or offloaded."""
    return (
        type(module) is nn.Linear
        and type(module.weight.data) is Tensor
        and module.weight.device.type != "meta"
        and not hasattr(module, "_hf_hook")
    )


def _groups(model: nn.Module, linears: list[tuple[str, nn.Module]]) -> dict[str, str]:
    device = next(model.parameters()).device
    with input_groups(linears) as (groups, _), torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    return groups
