"""Rearranges the factors of a loaded model for faster inference. Checkpoints are not affected.

1. Joined: q, k and v read one tensor, and so do gate and up. ``V_q x``, ``V_k x`` and ``V_v x`` become one product with
   the rows of all three, which starts once and is large enough to keep a device busy.
2. Gathered once: linears packed by rows write into one buffer, whose columns one gather puts in order; those packed by
   columns read one gather of the input, and add within it. Nothing is concatenated or copied.
3. Aligned: ranks are padded with zeros to multiples of 16, which makes products several per cent faster.
4. Laid out: in full precision on a CPU, ``U`` is stored column by column. ``U z`` for one token then adds long columns,
   instead of many short products of rows.

Each step was measured to help (docs/speed.md). Parameters keep their shapes and names, as views of the padded tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdllm.inference.packed import bias_of, latent_of, rank_of
from svdllm.inference.shared_product import SharedProduct
from svdllm.models.hooks import input_groups
from svdllm.models.low_rank import FACTORED, LowRankLinear, PackedLinear
from svdllm.models.low_rank.lowrank import Expert


class _Member(nn.Module):
    """A linear with a shared product, whose tensors are joined again once it was moved, cast or loaded into."""

    shared: SharedProduct
    index: int

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.shared.forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.shared.forget()
        super()._load_from_state_dict(*args)

    def _needs_gradients(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (
            x.requires_grad or any(parameter.requires_grad for parameter in self.parameters())
        )


def _shaped(output: Tensor, x: Tensor) -> Tensor:
    """Gives an output (tokens, features) the leading sizes of ``x``."""
    return output.view(*x.shape[:-1], output.shape[1])


class FusedLinear(_Member, nn.Linear):
    """A dense linear that shares a product with the first factors of its group."""

    def forward(self, x: Tensor) -> Tensor:
        if self._needs_gradients(x):
            return super().forward(x)
        return _shaped(self.shared.part(self.index, x), x)


class FusedFactors(_Member):
    """A pair or a packed linear whose latent, or output, is a part of a shared product."""

    def forward(self, x: Tensor) -> Tensor:
        if self._needs_gradients(x):
            return super().forward(x)
        part, bias_O = self.shared.part(self.index, x), bias_of(self)
        u_OR = self.shared.second[self.index]
        if u_OR is not None:
            output = F.linear(part, u_OR, bias_O)
        else:
            output = part if bias_O is None else part.add_(bias_O)
        return _shaped(output, x)

    def latent(self, x: Tensor) -> Tensor:
        """The latent (..., rank), of a linear packed by rows only after ``shared.give_latent``."""
        if self._needs_gradients(x):
            return latent_of(self, x)
        return _shaped(self.shared.part(self.index, x), x)[..., : rank_of(self)]


class FusedLowRankLinear(FusedFactors, LowRankLinear):
    """A pair in a shared product."""


class FusedPackedLinear(FusedFactors, PackedLinear):
    """A packed linear in a shared product."""


_FUSED: dict[type[nn.Module], Any] = {
    nn.Linear: FusedLinear,
    LowRankLinear: FusedLowRankLinear,
    PackedLinear: FusedPackedLinear,
}


def fuse_factors(model: nn.Module) -> int:
    """Joins, aligns and lays out the factors of a low-rank model, in place.

    Linears that read the same tensor, found in one forward pass over two tokens, share their work, together with dense
    linears without a bias in the same group. Results differ by rounding only. Weights keep their names and shapes, and
    may be saved, moved, cast and loaded into. With gradients, the separate products are used.

    Returns:
        The number of groups of several linears that share a product.

    Raises:
        UnsupportedModelError: a linear does not always share its input with the same others.
    """
    linears = dict(_linears(model))
    if not any(isinstance(linear, FACTORED) for linear in linears.values()):
        return 0
    groups: dict[str, list[nn.Module]] = {}
    for name, leader in _groups(model, list(linears.items())).items():
        groups.setdefault(leader, []).append(linears[name])
    factored = [group for group in groups.values() if any(isinstance(linear, FACTORED) for linear in group)]
    for group in factored:
        shared = SharedProduct(group)
        for index, linear in enumerate(group):
            linear.__class__ = _FUSED[type(linear)]
            linear.__dict__.update(shared=shared, index=index)
        shared.join()
    return sum(len(group) > 1 for group in factored)


def is_plain(module: Any) -> bool:
    """Whether a module is a plain linear in memory: not quantised, sharded, adapted or offloaded."""
    return (
        type(module) is nn.Linear
        and type(module.weight.data) is Tensor
        and module.weight.device.type != "meta"
        and not hasattr(module, "_hf_hook")
    )


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the pairs, the packed linears, and the dense linears without a bias, with their names.

    Those of experts are not among them: they are computed together, or for the tokens of one expert at a time.
    """
    factors = {part for module in model.modules() if isinstance(module, FACTORED) for part in module.children()}
    factors |= {part for module in model.modules() if isinstance(module, Expert) for part in module.modules()}
    for name, module in model.named_modules():
        if module in factors:
            continue
        if (type(module) in FACTORED and is_plain(module.svd_v) and is_plain(module.svd_u)) or (
            is_plain(module) and module.bias is None
        ):
            yield name, module


def _groups(model: nn.Module, linears: list[tuple[str, nn.Module]]) -> dict[str, str]:
    device = next(model.parameters()).device
    with input_groups(linears) as (groups, _), torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    return groups
