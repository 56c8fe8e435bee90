"""DRONE against the theoretical minimum and against svd-llm: the same loss by another way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from drone_factors import drone_bytes, drone_factors
from reference import measured_loss, optimal_outputs
from svdllm.common.errors import InputError, ResourceError
from svdllm.compression.math.linalg import factorise, output_spectrum

SHAPES = [(9, 14), (14, 9), (11, 11), (1, 6), (6, 1)]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made_inputs(kind: str, in_features: int) -> Tensor:
    """``X^T`` (``tokens x in``)."""
    x_TI = rand(40, in_features, seed=1)
    if kind == "few tokens":
        return x_TI[: max(1, in_features // 3)]
    if kind == "dead channel":
        x_TI[:, in_features // 2] = 0
    if kind == "dependent channels":
        x_TI[:, 0] = 2 * x_TI[:, -1]
    if kind == "ill conditioned":
        return x_TI * torch.logspace(0, -4, in_features).double()
    return x_TI


@pytest.mark.parametrize("kind", ["plain", "few tokens", "dead channel", "dependent channels", "ill conditioned"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("deficient", [False, True])
def test_the_loss_is_the_least_there_is_and_svd_llms(shape: tuple[int, int], kind: str, deficient: bool):
    weight_OI, x_TI = rand(*shape), made_inputs(kind, shape[1])
    if deficient and min(shape) > 3:
        weight_OI = rand(shape[0], 3) @ rand(3, shape[1], seed=2)
    total = float((weight_OI @ x_TI.T).square().sum())
    for rank in range(1, min(shape) + 1):
        u_OR, v_RI = drone_factors(weight_OI, [x_TI[:1], x_TI[1:]], rank)
        assert u_OR.dtype == v_RI.dtype == torch.float64
        available = [int(torch.linalg.matrix_rank(matrix)) for matrix in (weight_OI, x_TI)]
        assert u_OR.shape == (shape[0], min(rank, *available))
        assert v_RI.shape == (min(rank, *available), shape[1])
        loss = float(measured_loss(weight_OI, u_OR @ v_RI, x_TI.T))
        least = float((weight_OI @ x_TI.T - optimal_outputs(weight_OI, x_TI.T, rank)).square().sum())
        spectrum = output_spectrum(weight_OI, x_TI.T @ x_TI)
        u_OS, v_SI = factorise(weight_OI, spectrum, rank)
        theirs = float(measured_loss(weight_OI, u_OS @ v_SI, x_TI.T))
        assert loss == pytest.approx(least, rel=1e-10, abs=1e-13 * total)
        assert loss == pytest.approx(theirs, rel=1e-8, abs=1e-13 * total)


def test_by_hand():
    """Diagonal W and X: W X has singular values 3 * 1, 2 * 4, 1 * 2. Rank 1 keeps the second, rank 2 the first too."""
    weight_OI, x_TI = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.diag(torch.tensor([1.0, 4.0, 2.0]))
    for rank, kept in ((1, [0.0, 2.0, 0.0]), (2, [3.0, 2.0, 0.0]), (3, [3.0, 2.0, 1.0])):
        u_OR, v_RI = drone_factors(weight_OI, [x_TI], rank)
        torch.testing.assert_close(u_OR @ v_RI, torch.diag(torch.tensor(kept)).double())


def test_it_is_the_weight_times_a_matrix_and_blind_where_no_input_was():
    weight_OI, x_TI = rand(8, 12), made_inputs("few tokens", 12)
    u_OR, v_RI = drone_factors(weight_OI, [x_TI], 3)
    multiplier_II = torch.linalg.pinv(weight_OI) @ (u_OR @ v_RI)
    torch.testing.assert_close(weight_OI @ multiplier_II, u_OR @ v_RI)
    unseen_I = rand(12) - torch.linalg.pinv(x_TI) @ (x_TI @ rand(12))
    torch.testing.assert_close(v_RI @ unseen_I, torch.zeros(3, dtype=torch.float64))


def test_nothing_is_left_of_nothing():
    for weight_OI, x_TI in ((torch.zeros(4, 6), rand(9, 6)), (rand(4, 6), torch.zeros(9, 6))):
        u_OR, v_RI = drone_factors(weight_OI, [x_TI], 2)
        assert torch.equal(u_OR @ v_RI, torch.zeros(4, 6, dtype=torch.float64))


def test_batches_of_any_shape_and_dtype():
    weight_OI, x_TI = rand(5, 6).float(), rand(24, 6).float()
    whole = drone_factors(weight_OI, [x_TI], 2)
    parts = drone_factors(weight_OI, iter([x_TI[:8].view(2, 4, 6), x_TI[8:]]), 2)
    for ours, theirs in zip(whole, parts, strict=True):
        assert torch.equal(ours, theirs)


def test_inputs_beyond_the_memory_are_refused_before_they_are_kept():
    """50 tokens of 6 features: 8 (2 * 300 + 6 * 56 + 8 * 36) bytes."""
    assert drone_bytes(50, 6) == 9792
    seen = []

    def endless() -> Iterator[Tensor]:
        while True:
            seen.append(1)
            yield rand(10, 6)

    with pytest.raises(
        ResourceError, match=r"60 tokens or more of 6 features take 0\.0 GB .*svdllm\.compression\.math\.linalg"
    ):
        drone_factors(rand(4, 6), endless(), 2, memory=9792)
    assert len(seen) == 6
    drone_factors(rand(4, 6), [rand(10, 6)] * 5, 2, memory=9792)
    seven_b = torch.zeros(1, dtype=torch.float16).expand(5000 * 256, 11008)
    with pytest.raises(ResourceError, match=r"1,280,000 tokens or more .* take 346\.\d GB with their SVD, 4\.3 GB"):
        drone_factors(torch.zeros(1).expand(4096, 11008), [seven_b], 2048)


def test_what_is_no_problem_is_refused():
    for arguments, message in (
        ((rand(4, 6), [rand(9, 6)], 0), "rank must be at least 1, found 0"),
        ((rand(4, 6), [], 2), "There are no inputs"),
        ((rand(4, 6), [rand(9, 5)], 2), "The inputs have 5 features, the weight takes 6"),
    ):
        with pytest.raises(InputError, match=message):
            drone_factors(*arguments)
