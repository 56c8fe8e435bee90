"""Products with one tensor that serve several linears.

Each takes the linears by index and is called with the tensor (T, I); it returns the part of each linear (T, features).

Shapes: ``T`` tokens, ``I`` inputs, ``O`` outputs, ``R`` rank, ``B`` width of a buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from svdllm.models.low_rank import FACTORED

ALIGNMENT = 16
Parts = list[tuple[int, Tensor]]


class JoinedProduct:
    """One product with the dense weights and first factors of all linears."""

    def __init__(self, linears: Mapping[int, Any]):
        factors = {linear.svd_v for linear in linears.values() if isinstance(linear, FACTORED)}
        firsts = {index: getattr(linear, "svd_v", linear) for index, linear in linears.items()}
        places = {first: place for place, first in enumerate(dict.fromkeys(firsts.values()))}  # some share theirs
        self.sizes = [_aligned(first.out_features) if first in factors else first.out_features for first in places]
        self.places = {index: places[first] for index, first in firsts.items()}
        like = next(iter(places)).weight
        self.weight_OI = like.new_zeros(sum(self.sizes), like.shape[1])
        for first, rows_OI in zip(places, self.weight_OI.split(self.sizes), strict=True):
            _move(first.weight, rows_OI)

    def __call__(self, x_TI: Tensor) -> Parts:
        pieces = F.linear(x_TI, self.weight_OI).split_with_sizes(self.sizes, 1)
        return [(index, pieces[place]) for index, place in self.places.items()]


class BufferedProduct:
    """One product, written into a buffer, and one gather of the outputs of all linears that are packed by rows.

    The rows of these linears that are no pivots are computed within the buffer.
    """

    def __init__(self, plain: Mapping[int, Any], by_rows: Mapping[int, Any]):
        self.joined = JoinedProduct({**plain, **by_rows})
        self.plain = {index: self.joined.places[index] for index in plain}
        self.pivots = {index: self.joined.places[index] for index in by_rows}
        self.others = [second_factor(linear.svd_u.weight, align_outputs=True) for linear in by_rows.values()]
        self.sizes = [*self.joined.sizes, *(len(u_OR) for u_OR in self.others)]
        self.outputs = [len(linear.order) for linear in by_rows.values()]
        starts = [0, *accumulate(self.sizes)]
        begins = zip(
            by_rows.values(), self.pivots.values(), range(len(self.joined.sizes), len(self.sizes)), strict=True
        )
        self.order_O = torch.cat(
            [
                linear.order + torch.where(linear.order < linear.rank, starts[pivot], starts[other] - linear.rank)
                for linear, pivot, other in begins
            ]
        )

    def __call__(self, x_TI: Tensor) -> Parts:
        weight_OI = self.joined.weight_OI
        buffer_TB = x_TI.new_empty(len(x_TI), sum(self.sizes))
        buffer_TB[:, : len(weight_OI)].addmm_(x_TI, weight_OI.mT, beta=0)
        pieces = buffer_TB.split_with_sizes(self.sizes, 1)
        for pivot, u_OR, other_TO in zip(self.pivots.values(), self.others, pieces[-len(self.others) :], strict=True):
            other_TO.addmm_(pieces[pivot], u_OR.mT, beta=0)
        outputs = buffer_TB.index_select(1, self.order_O).split_with_sizes(self.outputs, 1)
        return [
            *zip(self.pivots, outputs, strict=True),
            *((index, pieces[place]) for index, place in self.plain.items()),
        ]


class GatheredInputs:
    """One gather of the inputs of all linears, which are packed by columns; their latents are computed within it."""

    def __init__(self, linears: Mapping[int, Any]):
        keys = {index: (linear.svd_v, tuple(linear.order.tolist())) for index, linear in linears.items()}
        distinct = dict(zip(keys.values(), linears.values(), strict=True))  # some share theirs
        places = {key: place for place, key in enumerate(distinct)}
        self.places = {index: places[key] for index, key in keys.items()}
        weights = [linear.svd_v.weight for linear in distinct.values()]
        self.coefficients = [_coefficients(weight_RI, _aligned(weight_RI.shape[1])) for weight_RI in weights]
        self.sizes = [size for c_RI in self.coefficients for size in c_RI.shape]
        self.order_I = torch.cat([_padded_order(linear.order, linear.rank) for linear in distinct.values()])

    def __call__(self, x_TI: Tensor) -> Parts:
        pieces = x_TI.index_select(1, self.order_I).split_with_sizes(self.sizes, 1)
        for pivots_TR, others_TI, c_RI in zip(pieces[::2], pieces[1::2], self.coefficients, strict=True):
            pivots_TR.addmm_(others_TI, c_RI.mT)
        return [(index, pieces[2 * place]) for index, place in self.places.items()]


class OrderedInputs:
    """The latents of linears that are packed by columns and take their inputs in the order in which these come."""

    def __init__(self, linears: Mapping[int, Any]):
        weights = {index: linear.svd_v.weight for index, linear in linears.items()}
        self.ranks = {index: linear.rank for index, linear in linears.items()}
        self.coefficients = {index: _coefficients(weight, weight.shape[1]) for index, weight in weights.items()}

    def __call__(self, x_TI: Tensor) -> Parts:
        return [(index, self._latent(x_TI, c_RI, self.ranks[index])) for index, c_RI in self.coefficients.items()]

    def _latent(self, x_TI: Tensor, c_RI: Tensor, rank: int) -> Tensor:
        latent_TR = x_TI[:, rank:].mm(c_RI.mT)
        latent_TR[:, :rank].add_(x_TI[:, :rank])
        return latent_TR


Product = JoinedProduct | BufferedProduct | GatheredInputs | OrderedInputs


def is_ordered(linear: Any) -> bool:
    """Whether the ``order`` of a packed linear changes nothing."""
    return torch.equal(linear.order, torch.arange(len(linear.order)).to(linear.order))


def second_factor(weight_OR: Tensor, *, align_outputs: bool = False) -> Tensor:
    """Pads ``U`` with zero columns, laid out for its device and dtype; the parameter becomes a view of the result."""
    height = _aligned(len(weight_OR)) if align_outputs else len(weight_OR)
    shape = height, _aligned(weight_OR.shape[1])
    by_column = weight_OR.device.type == "cpu" and weight_OR.dtype in (torch.float32, torch.float64)
    padded_OR = weight_OR.new_zeros(shape[::-1]).mT if by_column else weight_OR.new_zeros(shape)
    return _move(weight_OR, padded_OR)


def _coefficients(weight_RI: Tensor, inputs: int) -> Tensor:
    """Pads coefficients with zero rows, and zero columns up to ``inputs``; the parameter becomes a view."""
    return _move(weight_RI, weight_RI.new_zeros(_aligned(len(weight_RI)), inputs))


def _padded_order(order_I: Tensor, rank: int) -> Tensor:
    """The order with the first input, whose coefficients are zero, in the places that are padded."""
    pieces = order_I[:rank], order_I[rank:]
    return torch.cat([F.pad(piece, (0, _aligned(len(piece)) - len(piece))) for piece in pieces])


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _move(parameter: Tensor, place: Tensor) -> Tensor:
    """Copies a parameter into the first rows and columns of ``place``, and makes it a view of them."""
    view = place[: parameter.shape[0], : parameter.shape[1]]
    view.copy_(parameter)
    parameter.data = view
    return place
