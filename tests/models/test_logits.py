"""Logits of two models are compared by one rule: relative to the largest, with a tolerance by dtype."""

from __future__ import annotations

import pytest
import torch

from svdllm.common.errors import NumericalError
from svdllm.models.logits import compare_logits, full_precision, tolerance_of

EXPECTED = torch.tensor([[1.0, -4.0, 2.0]])


def test_the_difference_is_a_share_of_the_largest_logit() -> None:
    found = EXPECTED + torch.tensor([[0.0, 0.0, 0.002]])
    assert compare_logits(found, EXPECTED, NumericalError) == pytest.approx(0.002 / 4, rel=1e-3)


@pytest.mark.parametrize("wrong", [EXPECTED + 0.02, EXPECTED * float("nan")])
def test_other_logits_are_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(NumericalError, match=r"the logits differ by (5\.0e-03|nan) of the largest \(at most 1e-03 exp"):
        compare_logits(wrong, EXPECTED, NumericalError)


def test_tolerance_grows_with_what_a_dtype_rounds() -> None:
    assert tolerance_of(torch.float64) == tolerance_of(torch.float32) == 1e-3
    assert tolerance_of(torch.float16) == 2**-5  # of eps 2^-10
    assert 2**-4 < tolerance_of(torch.bfloat16) < 2**-3  # of eps 2^-7


def test_products_are_in_full_precision_inside_and_as_before_outside() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
