"""The dense matrix, as it is in the source: no size, no error, full price."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from svdllm.compression.forms.rows import Fitted, Form, Shapes, out_features_of
from svdllm.models.structure import Target


def _shapes(target: Target, linear: str, size: int) -> Shapes:
    shape = (out_features_of(target, linear), target.in_features)
    bias: Shapes = {"bias": shape[:1]} if target.has_bias else {}
    return {"weight": shape[::-1] if target.is_conv1d else shape} | bias


def _entry(target: Target, linear: str, size: int) -> dict[str, Any]:
    return {}


def _store(target: Target, fitted: Fitted, size: int, order: Tensor | None) -> dict[str, dict[str, Tensor]]:
    stored = {}
    biases = target.split(fitted["bias"]) if "bias" in fitted else {}
    for name, rows in target.split(fitted["weight"]).items():
        stored[name] = {"weight": (rows.mT if target.is_conv1d else rows).contiguous()}
        stored[name] |= {"bias": biases[name]} if name in biases else {}
    return stored


DENSE = Form(
    name="dense",
    summary="the matrix as it is",
    source="the model",
    curve="",
    sizes=lambda target, round_to: (),
    shapes=_shapes,
    entry=_entry,
    store=_store,
    adds_bias=False,
)
