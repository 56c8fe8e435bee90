"""A matrix in few bits: integers of which the groups of a row share a scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from svdllm.checkpoint.integers import pack_integers, packed_width
from svdllm.compression.forms.packed import PACKED
from svdllm.compression.forms.pair import PAIR
from svdllm.compression.forms.rows import Fitted, Form, Shapes
from svdllm.compression.math.rounding import Rounded, round_rows
from svdllm.models.structure import Target

BITS = (8, 6, 5, 4, 3, 2)
GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP = 64
LEAST_BITS_OF_VOCABULARY = 4
PANEL_VALUES = 2**22  # of a matrix that is rounded to nearest, which takes several times their memory
# Fitted tensors: codes as they are computed, one number each, and their scales.
CODES, SCALES = "codes", "weight_scale"


def group_size_of(target: Target) -> int:
    """The inputs that share a scale, where nothing else is asked for."""
    return group_size_for(target.in_features)


def group_size_for(in_features: int, wanted: int = DEFAULT_GROUP) -> int:
    """The group size nearest to a wanted one of those that divide the inputs; a whole row where none does."""
    return min(_dividing(in_features), key=lambda size: abs(size - wanted))


def _dividing(in_features: int) -> list[int]:
    return [size for size in GROUP_SIZES if in_features % size == 0] or [in_features]


def fitted_rounding(rounded: Rounded) -> dict[str, Tensor]:
    """The fitted tensors of a matrix that was rounded."""
    return {CODES: rounded.codes_OI, SCALES: rounded.scales_OG}


def rounded_matrix(fitted: Fitted) -> Tensor:
    """The matrix (``out x in``) that fitted tensors stand for, in the dtype of their scales."""
    return Rounded(fitted[CODES], fitted[SCALES]).matrix


def _sizes(target: Target, round_to: int, *, bits: int) -> Sequence[int]:
    """The group sizes: those of ``GROUP_SIZES`` that divide the inputs, or else a whole row.

    Conv1D, joint factors and single experts have none: no runtime loads them in few bits. Embedding and head have at
    least 4 bits.
    """
    too_few = bool(target.vocabulary) and bits < LEAST_BITS_OF_VOCABULARY
    if target.is_conv1d or target.parts or target.pool is not None or too_few:
        return ()
    return _dividing(target.in_features)


def _shapes(target: Target, linear: str, group_size: int, *, bits: int) -> Shapes:
    rows, columns = target.out_features, target.in_features
    shapes = packed_shapes(rows, columns, bits, group_size)
    if is_own_module(target):
        return {"packed_codes": shapes["weight_packed"], "packed_scales": shapes[SCALES]}
    return shapes | ({"bias": (rows,)} if target.has_bias else {})


def _store(
    target: Target, fitted: Fitted, group_size: int, order: Tensor | None, *, bits: int
) -> dict[str, dict[str, Tensor]]:
    packed = pack_integers(fitted[CODES], bits)
    if is_own_module(target):
        return {target.name: {"packed_codes": packed, "packed_scales": fitted[SCALES]}}
    shape = torch.tensor([target.out_features, target.in_features])
    stored = {"weight_packed": packed, SCALES: fitted[SCALES], "weight_shape": shape}
    return {target.name: stored | ({"bias": fitted["bias"]} if "bias" in fitted else {})}


def _entry(target: Target, linear: str, group_size: int) -> dict[str, Any]:
    return {}


def is_own_module(target: Target) -> bool:
    """Whether a module of ours holds a matrix in few bits: transformers loads linears, and no embedding.

    Its tensors have other names than those of a linear, lest they be taken for one.
    """
    return target.vocabulary == "embedding"


def _row(bits: int) -> Form:
    return Form(
        name=f"int{bits}",
        summary=f"the matrix in {bits} bits",
        source="GPTQ, arXiv 2210.17323",
        curve="rounding",
        sizes=partial(_sizes, bits=bits),
        shapes=partial(_shapes, bits=bits),
        entry=_entry,
        store=partial(_store, bits=bits),
        bits=bits,
        needs_gram=True,
        adds_bias=False,
    )


def _factors_in_bits(base: Form, bits: int) -> Form:
    """A form whose factors are stored in few bits."""

    def shapes(target: Target, linear: str, size: int) -> Shapes:
        found: Shapes = {}
        for leaf, shape in base.shapes(target, linear, size).items():
            found |= _factor_shapes(leaf, *shape, bits=bits) if leaf.endswith(FACTOR) else {leaf: shape}
        return found

    return replace(
        base,
        name=f"{base.name}-int{bits}",
        summary=f"{base.name}, its factors in {bits} bits",
        shapes=shapes,
        base=base,
        factor_bits=bits,
        nested=False,
    )


def _factor_shapes(leaf: str, rows: int, columns: int, *, bits: int) -> Shapes:
    owner = leaf.removesuffix("weight")
    return {f"{owner}{part}": shape for part, shape in packed_shapes(rows, columns, bits, None).items()}


def packed_shapes(rows: int, columns: int, bits: int, group_size: int | None) -> Shapes:
    """The tensors that take the place of a weight in few bits; a row has one scale where ``group_size`` is None."""
    return {
        "weight_packed": (rows, packed_width(columns, bits)),
        SCALES: (rows, columns // (group_size or columns)),
        "weight_shape": (2,),
    }


def rounded_tensors(weight_OI: Tensor, bits: int, group_size: int | None) -> dict[str, Tensor]:
    """Rounds a weight to nearest: the tensors of ``packed_shapes``, scales in the dtype of the weight."""
    rows, columns = weight_OI.shape
    parts = [
        round_rows(
            panel.float(), None, torch.full((len(panel),), 2.0 ** (bits - 1)), group_size or columns, panel.dtype
        )
        for panel in weight_OI.split(max(1, PANEL_VALUES // columns))
    ]
    return {
        "weight_packed": torch.cat([pack_integers(part.codes_OI, bits) for part in parts]),
        SCALES: torch.cat([part.scales_OG for part in parts]),
        "weight_shape": torch.tensor([rows, columns]),
    }


def packed_factors(stored: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """The tensors of a linear with its factors, in the dtype of the source, packed; their scales have that dtype."""
    found: dict[str, Tensor] = {}
    for leaf, tensor in stored.items():
        if not leaf.endswith(FACTOR):
            found[leaf] = tensor
            continue
        owner = leaf.removesuffix("weight")
        found |= {f"{owner}{part}": value for part, value in rounded_tensors(tensor, bits, None).items()}
    return found


def _corrected(integers: Form) -> Form:
    """A matrix in few bits, and factors in 8 bits that correct it."""
    bits = integers.bits
    assert bits is not None

    def sizes(target: Target, round_to: int) -> Sequence[int]:
        able = integers.sizes(target, 1) and not target.vocabulary
        return (
            range(round_to, min(target.full_rank, target.break_even_rank // CORRECTED_SHARE) + 1, round_to)
            if able
            else ()
        )

    def shapes(target: Target, linear: str, rank: int) -> Shapes:
        base = integers.shapes(target, linear, group_size_of(target))
        factors = _factor_shapes("svd_v.weight", rank, target.in_features, bits=CORRECTION_BITS)
        factors |= _factor_shapes("svd_u.weight", target.out_features, rank, bits=CORRECTION_BITS)
        return {f"{BASE}{leaf}": shape for leaf, shape in base.items()} | factors

    def store(target: Target, fitted: Fitted, rank: int, order: Tensor | None) -> dict[str, dict[str, Tensor]]:
        base = integers.store(target, fitted, group_size_of(target), order)[target.name]
        factors = {leaf: fitted[leaf] for leaf in ("svd_v.weight", "svd_u.weight")}
        return {target.name: {f"{BASE}{leaf}": tensor for leaf, tensor in base.items()} | factors}

    return Form(
        name=f"{integers.name}-corrected",
        summary=f"the matrix in {bits} bits and a low-rank correction in {CORRECTION_BITS}",
        source="LQER, EoRA, LoftQ; docs/quantization.md",
        curve="correction",
        sizes=sizes,
        shapes=shapes,
        entry=lambda target, linear, rank: {"form": "corrected", "rank": rank},
        store=store,
        exact_rank=lambda target, params: (
            max(0.0, params - target.num_weights) / (target.in_features + target.out_features)
        ),
        base=integers,
        factor_bits=CORRECTION_BITS,
        needs_gram=True,
        adds_bias=False,
    )


BASE = "base."
CORRECTION_BITS = 8
CORRECTED_SHARE = 4  # a correction of more than this part of the break-even rank would cost as much as another bit
FACTOR = ".weight"  # how the names of factors end within a linear
INTEGERS = tuple(map(_row, BITS))
FACTORS_IN_BITS = (_factors_in_bits(PAIR, 8), _factors_in_bits(PACKED, 8))
CORRECTED = tuple(_corrected(row) for row in INTEGERS if row.bits in (4, 3, 2))


def product_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight (``out x in``, float64) that factors multiply out to, or a fitted dense weight."""
    if "weight" in tensors:
        return tensors["weight"].double()
    product_OI = rounded_matrix(tensors).double() if CODES in tensors else 0.0
    if "svd_u.weight" not in tensors:
        return product_OI  # type: ignore[return-value]
    return product_OI + tensors["svd_u.weight"].double() @ tensors["svd_v.weight"].double()
