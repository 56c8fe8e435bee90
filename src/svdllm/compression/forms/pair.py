"""A pair of factors, ``W' = U V``: the form of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from svdllm.compression.forms.rows import Fitted, Form, Shapes, out_features_of
from svdllm.models.structure import Target


def _sizes(target: Target, round_to: int) -> Sequence[int]:
    return () if target.vocabulary else range(round_to, target.break_even_rank + 1, round_to)


def _shapes(target: Target, linear: str, rank: int) -> Shapes:
    """The first factor is stored with the first of the linears that share it."""
    out_features = out_features_of(target, linear)
    first: Shapes = {"svd_v.weight": (rank, target.in_features)} if linear == target.linears[0] else {}
    bias: Shapes = {"svd_u.bias": (out_features,)} if target.has_bias or target.bias_corrected else {}
    return first | {"svd_u.weight": (out_features, rank)} | bias


def _entry(target: Target, linear: str, rank: int) -> dict[str, Any]:
    return {"form": "pair", "rank": rank}


def _store(target: Target, fitted: Fitted, rank: int, order: Tensor | None) -> dict[str, dict[str, Tensor]]:
    stored = {name: {"svd_u.weight": rows} for name, rows in target.split(fitted["svd_u.weight"]).items()}
    stored[target.linears[0]]["svd_v.weight"] = fitted["svd_v.weight"]
    for name, rows in target.split(fitted["bias"]).items() if "bias" in fitted else ():
        stored[name]["svd_u.bias"] = rows
    return stored


def _exact_rank(target: Target, params: float) -> float:
    return max(0.0, params - target.added_params) / (target.in_features + target.out_features)


PAIR = Form(
    name="pair",
    summary="two factors, below half of full rank",
    source="SVD-LLM, arXiv 2403.07378",
    curve="truncation",
    sizes=_sizes,
    shapes=_shapes,
    entry=_entry,
    store=_store,
    exact_rank=_exact_rank,
    nested=True,
)
