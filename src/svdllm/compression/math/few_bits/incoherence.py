"""Random rotations that spread a matrix evenly over its entries: signs, then a Hadamard matrix (QuIP#, 2402.04396).

A width is ``M`` times a power of two. The rotation is the Kronecker product of a core (``M x M``) and a Walsh matrix.
The core is the Hadamard matrix of the least size that Paley's constructions give; where there is none for a width, it
is a random orthogonal matrix of the odd factor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """An orthogonal matrix ``Q`` (``N x N``) that is applied without being made."""

    signs_N: Tensor
    core_MM: Tensor  # orthogonal

    def apply(self, rows: Tensor) -> Tensor:
        """``Q x`` of every row ``x`` (``..., N``)."""
        parts = (rows * self.signs_N).unflatten(-1, (len(self.core_MM), -1))
        return walsh(self.core_MM @ parts).flatten(-2)

    def undo(self, rows: Tensor) -> Tensor:
        """``Q^T x`` of every row ``x`` (``..., N``)."""
        parts = walsh(rows.unflatten(-1, (len(self.core_MM), -1)))
        return (self.core_MM.mT @ parts).flatten(-2) * self.signs_N


def random_rotation(size: int, generator: torch.Generator) -> Rotation:
    """A rotation (float64, on the CPU) of a width, by random signs."""
    signs_N = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    core_MM = hadamard_core(size)
    if core_MM is None:
        odd = odd_factor(size)
        core_MM = torch.linalg.qr(torch.randn(odd, odd, dtype=torch.float64, generator=generator)).Q
    return Rotation(signs_N, core_MM)


def hadamard_core(size: int) -> Tensor | None:
    """The least Hadamard matrix by Paley, over its root, whose size is that of the width over a power of two."""
    least = odd_factor(size)
    while least <= size:
        if size % least == 0 and (core_MM := hadamard(least)) is not None:
            return core_MM / math.sqrt(least)
        least *= 2
    return None


def odd_factor(size: int) -> int:
    return size // (size & -size)


def hadamard(size: int) -> Tensor | None:
    """A Hadamard matrix of a size (float64, ``H H^T = size``); None where Paley's two constructions give none.

    The size is 1 or 2, or ``q + 1`` for a prime ``q = 3 mod 4``, or ``2 (q + 1)`` for a prime ``q = 1 mod 4``.
    """
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if size <= 2:
        return pair[:size, :size]
    if size % 4 == 0 and is_prime(size - 1):
        return _conference(size - 1) + torch.eye(size, dtype=torch.float64)
    if size % 4 == 0 and is_prime(size // 2 - 1) and (size // 2 - 1) % 4 == 1:
        ones = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_conference(size // 2 - 1), pair) + torch.kron(
            torch.eye(size // 2, dtype=torch.float64), ones
        )
    return None


def walsh(rows: Tensor) -> Tensor:
    """The symmetric orthogonal Walsh matrix times every row (``..., a power of two``)."""
    step = 1
    while step < rows.shape[-1]:
        first, second = rows.unflatten(-1, (-1, 2, step)).unbind(-2)
        rows = torch.stack([first + second, first - second], dim=-2).flatten(-3) / math.sqrt(2)
        step *= 2
    return rows


def is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _conference(prime: int) -> Tensor:
    """Paley's conference matrix (``prime + 1`` rows): symmetric for primes of 1 mod 4, else skew-symmetric."""
    squares = {value * value % prime for value in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if value in squares else -1.0 for value in range(1, prime)]).double()
    places = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 1:] = 1
    matrix[1:, 0] = 1 if prime % 4 == 1 else -1
    matrix[1:, 1:] = character[(places[:, None] - places[None]) % prime]
    return matrix
