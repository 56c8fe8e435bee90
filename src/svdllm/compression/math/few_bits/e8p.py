"""The codebook E8P of QuIP# (arXiv 2402.04396): 2^16 points of the lattice E8 + 1/4, eight weights a code of 16 bits.

A point is a vector of D8 + 1/2 (half-integers whose sum is even), shifted by 1/4 or -1/4. Its magnitudes are one of 256
rows (8 bits); the signs of seven coordinates are free (7 bits), the eighth makes the sum even; the shift is one bit.
The rows are the 227 of squared norm up to 10, and 29 of squared norm 12; of these the authors' choice may be another.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations_with_replacement, permutations

import torch
from torch import Tensor

WIDTH = 8  # weights of a code
CODE_BITS = 16
SHIFTS = (0.25, -0.25)
NUM_ROWS, SMALL_NORM, LARGE_NORM = 256, 10, 12
ROOT_MEAN_SQUARE = 1.03  # of normal values for which the points lie best
CHUNK = 4096  # vectors that are looked up at once


@cache
def magnitudes() -> Tensor:
    """The rows of magnitudes (``256 x 8``, float32), by their norms."""
    found = {
        order
        for values in combinations_with_replacement((0.5, 1.5, 2.5), WIDTH)
        if sum(value**2 for value in values) <= LARGE_NORM
        for order in permuted(values)
    }
    ordered = sorted(found, key=lambda row: (sum(value**2 for value in row), max(row), row))
    return torch.tensor(ordered[:NUM_ROWS])


def permuted(values: tuple[float, ...]) -> set[tuple[float, ...]]:
    """All different orders of some values; the most frequent one fills the places that the others leave."""
    common = max(set(values), key=values.count)
    rare = [value for value in values if value != common]
    orders = set()
    for places in permutations(range(len(values)), len(rare)):
        row = [common] * len(values)
        for place, value in zip(places, rare, strict=True):
            row[place] = value
        orders.add(tuple(row))
    return orders


def nearest_points(vectors_NW: Tensor) -> Tensor:
    """The nearest point of the codebook to every vector (``N x 8``)."""
    return torch.cat([_nearest(chunk_NW) for chunk_NW in vectors_NW.split(CHUNK)])


def _nearest(vectors_NW: Tensor) -> Tensor:
    found = [_nearest_shifted(vectors_NW - shift) + shift for shift in SHIFTS]
    first_N, second_N = ((vectors_NW - points_NW).square().sum(1) for points_NW in found)
    return torch.where((first_N <= second_N)[:, None], *found)


def _nearest_shifted(vectors_NW: Tensor) -> Tensor:
    """The nearest points without shift: magnitudes with the vectors' signs, one of them turned where the sum is odd.

    The turned sign is that of the coordinate with the least product, which costs twice this product.
    """
    rows_RW = magnitudes().to(vectors_NW)
    sizes_NW, is_negative_NW = vectors_NW.abs(), vectors_NW < 0
    is_odd_NR = (is_negative_NW.sum(1)[:, None] + rows_RW.sum(1).long()[None]) % 2 == 1
    least_NR = sizes_NW[:, :1] * rows_RW[:, 0]
    for place in range(1, WIDTH):
        torch.minimum(least_NR, sizes_NW[:, place, None] * rows_RW[:, place], out=least_NR)
    products_NR = sizes_NW @ rows_RW.mT - 2 * least_NR * is_odd_NR
    best_N = (products_NR - rows_RW.square().sum(1) / 2).argmax(1)
    rows_NW = rows_RW[best_N]
    signs_NW = torch.where(is_negative_NW, -1.0, 1.0).to(vectors_NW)
    turned_N1 = (sizes_NW * rows_NW).argmin(1, keepdim=True)
    turn_N1 = torch.where(is_odd_NR.gather(1, best_N[:, None]), -1.0, 1.0).to(vectors_NW)
    signs_NW.scatter_(1, turned_N1, signs_NW.gather(1, turned_N1) * turn_N1)
    return rows_NW * signs_NW
