"""OneBit's value vectors, against the singular value decomposition."""

from __future__ import annotations

import pytest
import torch

from svdllm.compression.math.few_bits.gptq import default_group, gptq, gptq_bits
from svdllm.compression.math.few_bits.svid import one_bit_bits, value_vectors


def test_value_vectors_are_the_best_of_rank_one_for_the_magnitudes():
    weight = torch.randn(7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows, columns = value_vectors(weight)
    u, s, v = torch.linalg.svd(weight.abs())
    torch.testing.assert_close(rows[:, None] * columns, s[0] * u[:, :1] @ v[:1], rtol=1e-9, atol=1e-9)
    assert (rows > 0).all()
    assert (columns > 0).all()
    assert float(rows.norm()) == pytest.approx(float(columns.norm()))
    made = weight.sign() * rows[:, None] * columns
    assert float((weight - made).norm()) < float((weight - weight.sign() * weight.abs().mean()).norm())


def test_a_matrix_of_signs_and_values_is_itself_and_zero_is_zero():
    rows, columns = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.5, 1.0])
    signs = torch.tensor([[1.0, -1.0, 1.0], [-1.0, -1.0, 1.0]])
    found = value_vectors(signs * rows[:, None] * columns)
    torch.testing.assert_close(found.rows_O[:, None] * found.columns_I, rows[:, None] * columns)
    assert all((vector == 0).all() for vector in value_vectors(torch.zeros(2, 3)))


def test_bits_of_onebit_and_gptq():
    assert one_bit_bits(4096, 4096) / 4096**2 == pytest.approx(1.0078125)  # 1 + 2 * 16 / 4096
    assert gptq_bits(10, 256, 2) / 2560 == pytest.approx(2.125)  # 16 bits for each group of 128
    assert gptq_bits(10, 576, 3) / 5760 == pytest.approx(3.25)  # of 64
    assert gptq_bits(10, 576, 4, 32) / 5760 == pytest.approx(4.5)
    assert [default_group(size) for size in (1536, 576, 96, 50)] == [128, 64, 32, 50]


def test_gptq_has_as_many_values_in_a_group_as_its_bits_say():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    gram = torch.eye(64, dtype=torch.float64)
    for bits in (2, 3):
        found = gptq(weight, gram, bits, 32)
        assert found.bits == gptq_bits(4, 64, bits, 32)
        assert all(len(set(group.tolist())) <= 2**bits for group in found.weight_OI.view(-1, 32))
