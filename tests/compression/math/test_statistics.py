"""Gram and MeanAbsolute against their definitions, whatever the batches, dtypes and widths."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from svdllm.common.processes import ALONE, Processes
from svdllm.compression.math.statistics import TOKENS_PER_PRODUCT, Gram, MeanAbsolute
from svdllm.compression.math.symmetric import PANEL


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram_of(*batches: Tensor) -> Tensor:
    gram = Gram(batches[0].shape[-1])
    for batch in batches:
        gram.add(batch)
    return gram.value()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 5, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 7])
def test_gram_is_x_x_transposed_for_any_dtype_and_width(width: int, dtype: torch.dtype):
    tokens_TI = rand(50, width).to(dtype)
    value = gram_of(tokens_TI)
    expected = tokens_TI.double().T @ tokens_TI.double()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(value, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    assert value.dtype == torch.float64


def test_gram_by_hand():
    """Tokens (1, 2) and (3, -1): [[1 + 9, 2 - 3], [2 - 3, 4 + 1]]."""
    gram = Gram(2)
    gram.add(torch.tensor([[1.0, 2.0]]))
    gram.add(torch.tensor([[[3.0, -1.0]]]))
    assert gram.value().tolist() == [[10.0, -1.0], [-1.0, 5.0]]
    assert gram.num_tokens == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gram_is_exactly_symmetric(dtype: torch.dtype):
    value = gram_of(rand(100, PANEL + 30).to(dtype))
    assert torch.equal(value, value.T)


@pytest.mark.parametrize("num_tokens", [TOKENS_PER_PRODUCT, TOKENS_PER_PRODUCT + 1, 2 * TOKENS_PER_PRODUCT + 100])
def test_gram_of_several_products(num_tokens: int):
    tokens_TI = rand(num_tokens, 6)
    expected = tokens_TI.float().double().T @ tokens_TI.float().double()
    gram = Gram(6)
    gram.add(tokens_TI.float())
    assert gram.num_tokens == num_tokens
    torch.testing.assert_close(gram.value(), expected, rtol=0, atol=1e-5 * float(expected.max()))
    torch.testing.assert_close(gram_of(tokens_TI), tokens_TI.T @ tokens_TI, rtol=0, atol=1e-12 * float(expected.max()))


def test_a_product_never_sums_more_tokens_than_it_should(monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    monkeypatch.setattr(Gram, "_add_product", lambda self, tokens_TI: sizes.append(len(tokens_TI)))
    Gram(1).add(torch.ones(2, TOKENS_PER_PRODUCT, 1))
    Gram(1).add(torch.ones(TOKENS_PER_PRODUCT + 1, 1))
    assert sizes == [TOKENS_PER_PRODUCT, TOKENS_PER_PRODUCT, TOKENS_PER_PRODUCT, 1]


def test_tokens_are_counted_whatever_the_shape_of_a_batch():
    for statistic in (Gram(3), MeanAbsolute(3)):
        for shape in ((5, 3), (2, 4, 3), (3,)):
            statistic.add(torch.ones(shape))
        assert statistic.num_tokens == 5 + 8 + 1


def test_split_batches_give_the_same_gram():
    tokens_TI = rand(60, PANEL + 5)
    whole = gram_of(tokens_TI)
    split = gram_of(tokens_TI[:1], tokens_TI[1:33].reshape(4, 8, -1), tokens_TI[33:])
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        gram_of(*tokens_TI.float().split(7)), gram_of(tokens_TI.float()), rtol=0, atol=1e-6 * float(whole.max())
    )


def test_the_order_of_tokens_changes_nothing():
    tokens_TI = rand(60, 20)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(gram_of(tokens_TI[order]), gram_of(tokens_TI), rtol=0, atol=1e-10)


def test_scaling_the_inputs_scales_the_gram_quadratically():
    tokens_TI = rand(60, 20)
    torch.testing.assert_close(gram_of(3 * tokens_TI), 9 * gram_of(tokens_TI), rtol=1e-12, atol=1e-10)


def test_a_non_contiguous_input_is_read_as_it_is_seen():
    tokens_TI = rand(12, 40).float().T
    assert not tokens_TI.is_contiguous()
    expected = tokens_TI.double().T @ tokens_TI.double()
    torch.testing.assert_close(gram_of(tokens_TI), expected, rtol=0, atol=1e-4)


def test_small_tokens_after_large_ones_are_not_lost():
    """2^24 + 1 is no float32: a float32 sum would stand still, and lose all 300 tokens."""
    gram, float32_sum = Gram(1), torch.zeros(1, 1)
    for token in [torch.tensor([[4096.0]]), *[torch.ones(1, 1)] * 300]:
        gram.add(token)
        float32_sum += token.T @ token
    assert gram.value().item() == 2**24 + 300
    assert float32_sum.item() == 2**24


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_mean_is_summed_in_float64_whatever_the_dtype(dtype: torch.dtype):
    """70,000 ones: their sum is beyond float16, and no number of bfloat16."""
    gram = Gram(1)
    gram.add(torch.ones(70_000, 1, dtype=dtype))
    assert gram.mean().tolist() == [1.0]
    assert gram.mean().dtype == torch.float64
    assert gram.centred().tolist() == [[0.0]]


def test_centred_by_hand():
    """Tokens (1, 2) and (3, -1), less their mean (2, 0.5): twice (1, -1.5) up to the sign."""
    gram = Gram(2)
    gram.add(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    assert gram.mean().tolist() == [2.0, 0.5]
    assert gram.centred().tolist() == [[2.0, -3.0], [-3.0, 4.5]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_mean_absolute_by_hand(dtype: torch.dtype):
    """|1|, |-3| and |2| in the first channel, 0, |-1| and |0.5| in the second."""
    mean = MeanAbsolute(2)
    mean.add(torch.tensor([[1.0, 0.0], [-3.0, -1.0]], dtype=dtype))
    mean.add(torch.tensor([[[2.0, 0.5]]], dtype=dtype))
    assert mean.value().tolist() == [2.0, 0.5]
    assert mean.value().dtype == torch.float64
    assert mean.num_tokens == 3


def test_mean_absolute_sums_in_float64():
    """A thousand times 0.1 in bfloat16 (0.10009765625): a bfloat16 sum stops growing at 32."""
    mean = MeanAbsolute(1)
    mean.add(torch.full((1000, 1), 0.1, dtype=torch.bfloat16))
    assert mean.value().item() == pytest.approx(0.10009765625, rel=1e-12)


def test_nothing_seen_is_zero():
    assert MeanAbsolute(3).value().tolist() == [0.0, 0.0, 0.0]
    assert Gram(2).value().tolist() == [[0.0, 0.0], [0.0, 0.0]]


class Others(Processes):
    """Stands for processes that have summed the given shards beside the own one."""

    def __init__(self, *shards: list[Tensor]):
        self.count, self._shards = 1 + len(shards), [iter(shard) for shard in shards]

    def in_turn(self, tensor: Tensor) -> Iterator[Tensor]:
        yield tensor
        yield from (next(shard) for shard in self._shards)


@pytest.mark.parametrize("width", [3, PANEL + 1])
def test_shards_are_added_in_their_order_whoever_sums_them(width: int):
    """1e16 + 1 is 1e16 in float64, 1e16 + (1 + 1) is not: another order would show."""
    shards = [torch.full((1, width), value, dtype=torch.float64) for value in (1e8, 1.0, 1.0, 1.0)]

    def summed(gram: Gram) -> list[Tensor]:
        return [total.shard.clone() for total in gram._totals]

    alone = Gram(width)
    for shard in shards:
        alone.add(shard)
        alone.fold(ALONE)
    made = [Gram(width) for _ in shards]
    for gram, shard in zip(made, shards, strict=True):
        gram.add(shard)
    shared = Gram(width)
    for first, second in ((0, 1), (2, 3)):
        shared.add(shards[first])
        shared.fold(Others(summed(made[second])))
    assert torch.equal(shared.value(), alone.value())
    assert shared.num_tokens == alone.num_tokens == 4
    assert float(alone.value()[0, 0]) == 1e16
