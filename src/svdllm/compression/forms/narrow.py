"""A narrower MLP: fewer inner features, and the linear that reads them fitted to those that are kept.

The result is an ordinary MLP of smaller width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from svdllm.compression.forms.rows import Fitted, Form, Shapes
from svdllm.compression.math.narrowing import kept_rows
from svdllm.models.structure import Target


def _sizes(target: Target, round_to: int) -> Sequence[int]:
    return () if target.inner is None else range(round_to, target.inner.width, round_to)


def narrowed(target: Target, width: int) -> tuple[int, int]:
    """``(out_features, in_features)`` of a linear of an MLP that is narrowed to a width."""
    assert target.inner is not None
    if target.inner.side == "out":
        return target.inner.copies * width, target.in_features
    return target.out_features, width


def _shapes(target: Target, linear: str, width: int) -> Shapes:
    out_features, in_features = narrowed(target, width)
    weight = (in_features, out_features) if target.is_conv1d else (out_features, in_features)
    return {"weight": weight, **({"bias": (out_features,)} if target.has_bias else {})}


def _entry(target: Target, linear: str, width: int) -> dict[str, Any]:
    out_features, in_features = narrowed(target, width)
    narrowed_side = (
        {"in_features": in_features} if out_features == target.out_features else {"out_features": out_features}
    )
    return {"form": "narrow", **narrowed_side}


def _store(target: Target, fitted: Fitted, width: int, order: Tensor | None) -> dict[str, dict[str, Tensor]]:
    assert target.inner is not None
    assert order is not None
    weight_OI, bias_O = fitted["weight"], fitted.get("bias")
    order = order.to(weight_OI.device)
    if target.inner.side == "out":
        rows = kept_rows(order, width, target.inner.copies, target.inner.interleaved)
        weight_OI = weight_OI[rows]
        bias_O = None if bias_O is None else bias_O[rows]
    else:
        weight_OI = weight_OI[:, order[:width]]
    stored = {"weight": (weight_OI.mT if target.is_conv1d else weight_OI).contiguous()}
    return {target.name: stored | ({} if bias_O is None else {"bias": bias_O})}


NARROW = Form(
    name="narrow",
    summary="an MLP with fewer inner features",
    source="MoDeGPT (arXiv 2408.09632), type I; optimal brain surgeon; docs/method.md",
    curve="narrowing",
    sizes=_sizes,
    shapes=_shapes,
    entry=_entry,
    store=_store,
    of_mlps=True,
    needs_gram=True,
    adds_bias=False,
)
