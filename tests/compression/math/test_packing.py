"""Packed matrices: the same product, as many numbers as degrees of freedom, pivots of dominant volume."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from svdllm.compression.math.packing import LARGEST_COEFFICIENT, Packed, Side, pack, packed_side, unpack
from svdllm.models.low_rank import PackedLinear

SIDES: tuple[Side, ...] = ("rows", "columns")
SHAPES = [(7, 5), (5, 7), (6, 6), (2, 9), (40, 24)]


def random_pair(out: int, into: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((out, rank), (rank, into))
    u, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return u * torch.logspace(0, -3, rank, dtype=torch.float64), v


def dense_of(packed: Packed, side: Side) -> np.ndarray:
    """By the definition, one output (or input) feature after the other, in numpy."""
    v, u, order = (tensor.double().numpy() for tensor in packed)
    if side == "rows":
        found = np.concatenate([v, u @ v])
        return np.stack([found[int(place)] for place in order])
    weight = np.zeros((len(u), len(order)))
    for column, feature in zip((u @ np.concatenate([np.eye(len(v)), v], axis=1)).T, order, strict=True):
        weight[:, int(feature)] = column
    return weight


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("out", "into"), SHAPES)
def test_the_product_is_the_same_at_every_rank(out: int, into: int, side: Side) -> None:
    for rank in range(1, min(out, into)):
        u, v = random_pair(out, into, rank)
        packed = pack(u, v, side)
        expected = (u @ v).numpy()
        np.testing.assert_allclose(dense_of(packed, side), expected, rtol=0, atol=1e-12 * np.abs(expected).max())
        assert packed.svd_v.numel() + packed.svd_u.numel() == rank * (out + into - rank)
        assert packed.order.dtype == torch.int32
        assert sorted(packed.order.tolist()) == list(range(out if side == "rows" else into))
        again_u, again_v = unpack(packed, side)
        np.testing.assert_allclose((again_u @ again_v).numpy(), expected, rtol=0, atol=1e-12 * np.abs(expected).max())
        assert (again_u.shape, again_v.shape) == (u.shape, v.shape)


@pytest.mark.parametrize("side", SIDES)
def test_the_module_computes_the_product(side: Side) -> None:
    u, v = random_pair(9, 6, 4)
    packed, bias = pack(u, v, side), torch.arange(9.0, dtype=torch.float64)
    module = PackedLinear(6, 9, 4, True, side, dtype=torch.float64)
    tensors = {"svd_v.weight": packed.svd_v, "svd_u.weight": packed.svd_u, "order": packed.order, "bias": bias}
    module.load_state_dict(tensors)
    x = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(module(x), x @ (u @ v).mT + bias)


def test_a_packed_matrix_by_hand() -> None:
    """The third row is half the first plus half the second, and those have the greatest volume."""
    u = torch.tensor([[4.0, 0.0], [0.0, 4.0], [2.0, 2.0]])
    packed = pack(u, torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 1.0]]), "rows")
    pivots = packed.order.tolist()[:2]  # where the first two rows are found
    assert sorted(pivots) == [0, 1]
    assert packed.order[2] == 2
    torch.testing.assert_close(packed.svd_u, torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(packed.svd_v[pivots], torch.tensor([[4.0, 8.0, 12.0], [0.0, 4.0, 4.0]]))


@pytest.mark.parametrize("side", SIDES)
def test_no_swap_makes_the_volume_much_greater(side: Side) -> None:
    """The oracle: determinants of every choice that differs by one pivot."""
    for seed in range(5):
        u, v = random_pair(9, 8, 4, seed)
        packed = pack(u, v, side)
        order = packed.order.argsort() if side == "rows" else packed.order.long()
        factor = (u if side == "rows" else v.mT).numpy()
        pivots, others = order[:4].tolist(), order[4:].tolist()
        volume = abs(np.linalg.det(factor[pivots]))
        for place, other in itertools.product(range(4), others):
            swapped = [other if k == place else pivot for k, pivot in enumerate(pivots)]
            assert abs(np.linalg.det(factor[swapped])) <= volume * LARGEST_COEFFICIENT * (1 + 1e-9)


@pytest.mark.parametrize("side", SIDES)
def test_pivots_of_elimination_alone_would_be_far_too_small(side: Side) -> None:
    """In Wilkinson's example they give coefficients of 2^(rank - 1)."""
    rank = 12
    top = torch.eye(rank, dtype=torch.float64) - torch.ones(rank, rank, dtype=torch.float64).tril(-1)
    factor = torch.cat((top, -torch.ones(3, rank, dtype=torch.float64)))
    factor[-1] *= 0.5
    coefficients = torch.linalg.solve(top, factor[rank:], left=False)
    assert coefficients.abs().max() == 2 ** (rank - 1)
    other = random_pair(rank + 4, rank, rank)[0]
    u, v = (factor, other.mT) if side == "rows" else (other, factor.mT)
    packed = pack(u, v, side)
    largest = (packed.svd_u if side == "rows" else packed.svd_v).abs().max().item()
    assert largest <= LARGEST_COEFFICIENT * (1 + 1e-9)
    np.testing.assert_allclose(dense_of(packed, side), (u @ v).numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("empty", ["u", "v", "both"])
def test_directions_that_are_zero(side: Side, empty: str) -> None:
    u, v = random_pair(8, 7, 5)
    if empty != "v":
        u[:, 2:4] = 0
    if empty != "u":
        v[3:] = 0
    packed = pack(u, v, side)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in packed)
    np.testing.assert_allclose(dense_of(packed, side), (u @ v).numpy(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(dense_of(pack(u * 0, v, side), side), 0, rtol=0, atol=0)


@pytest.mark.parametrize("side", SIDES)
def test_rounding_to_bfloat16_against_that_of_a_pair(side: Side) -> None:
    """The stated factor, for random matrices truncated by their SVD: at most 4."""
    for seed, (out, into, rank) in enumerate([(96, 64, 30), (64, 96, 30), (64, 64, 20)]):
        weight = torch.randn(out, into, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        left, values, right = torch.linalg.svd(weight)
        u = left[:, :rank] * values[:rank].sqrt()
        v = values[:rank, None].sqrt() * right[:rank]
        packed = pack(u, v, side)
        rounded = Packed(packed.svd_v.bfloat16(), packed.svd_u.bfloat16(), packed.order)
        error = np.linalg.norm(dense_of(rounded, side) - (u @ v).numpy())
        assert error <= 4 * (u.bfloat16().double() @ v.bfloat16().double() - u @ v).norm()


def test_dtype_and_default_side() -> None:
    u, v = (tensor.bfloat16() for tensor in random_pair(6, 9, 3))
    packed = pack(u, v, "columns")
    assert {packed.svd_u.dtype, packed.svd_v.dtype} == {torch.bfloat16}
    assert packed.svd_u.is_contiguous()
    assert packed.svd_v.is_contiguous()
    assert [packed_side(8, 4), packed_side(4, 4), packed_side(4, 8)] == ["columns", "columns", "rows"]
