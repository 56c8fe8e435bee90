"""Packed factors: the same product as a pair, without the ``rank^2`` parameters that a pair has too many.

A matrix of rank r has ``r (d + n - r)`` degrees of freedom. Its pivot rows (or columns) are stored as they are, all
others as combinations of them. It is smaller than the dense matrix at every rank below full.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from svdllm.compression.forms.rows import Fitted, Form, Shapes
from svdllm.compression.math.packing import Side, pack, packed_side
from svdllm.models.structure import Target


def _side(target: Target) -> Side:
    """Columns where an MLP can make its inner features in their order; else by shape."""
    if target.inner is not None and target.inner.side == "in":
        return "columns"
    return packed_side(target.out_features, target.in_features)


def _sizes(target: Target, round_to: int) -> Sequence[int]:
    if target.parts or target.vocabulary:  # one first factor for several linears has no pivots of each
        return ()
    return range(round_to, target.full_rank - bool(target.added_params), round_to)


def _shapes(target: Target, linear: str, rank: int) -> Shapes:
    out_features, in_features = target.out_features, target.in_features
    bias: Shapes = {"bias": (out_features,)} if target.has_bias or target.bias_corrected else {}
    if _side(target) == "rows":
        factors: Shapes = {"svd_v.weight": (rank, in_features), "svd_u.weight": (out_features - rank, rank)}
        return factors | {"order": (out_features,)} | bias
    factors = {"svd_v.weight": (rank, in_features - rank), "svd_u.weight": (out_features, rank)}
    return factors | {"order": (in_features,)} | bias


def _entry(target: Target, linear: str, rank: int) -> dict[str, Any]:
    return {"form": "packed", "rank": rank, "side": _side(target)}


def _store(target: Target, fitted: Fitted, rank: int, order: Tensor | None) -> dict[str, dict[str, Tensor]]:
    packed = pack(fitted["svd_u.weight"], fitted["svd_v.weight"], _side(target))
    stored = {"svd_v.weight": packed.svd_v, "svd_u.weight": packed.svd_u, "order": packed.order}
    return {target.name: stored | ({"bias": fitted["bias"]} if "bias" in fitted else {})}


def _exact_rank(target: Target, params: float) -> float:
    """The smaller root of ``r (d + n - r) = params``."""
    both = target.in_features + target.out_features
    left = both**2 - 4 * max(0.0, params - target.added_params)
    return min((both - max(0.0, left) ** 0.5) / 2, float(target.full_rank))


PACKED = Form(
    name="packed",
    summary="the same product with fewer parameters, below full rank",
    source="PIFA, arXiv 2501.19090; docs/method.md",
    curve="truncation",
    sizes=_sizes,
    shapes=_shapes,
    entry=_entry,
    store=_store,
    exact_rank=_exact_rank,
    orders_inputs=True,
)
