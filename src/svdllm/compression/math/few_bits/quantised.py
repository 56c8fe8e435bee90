"""A quantised matrix as tables need it: the values that its codes stand for, and how many bits the codes take."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

SCALE_BITS = 16  # of a scale, a mean or a value vector


class Quantised(NamedTuple):
    """A matrix in few bits, dequantised.

    bits: of the whole matrix, by the formula of the method's authors.
    stored_bits: of the whole matrix with everything that dequantising it takes, such as masks and scales.
    """

    weight_OI: Tensor
    bits: float
    stored_bits: float
