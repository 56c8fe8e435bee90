"""Tensors that stand in a module for a while, and come out again whatever happens."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import nn

from svdllm.models.loaded_weights import tensors_replaced, weights_loaded


def module() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def test_parameters_and_buffers_come_back() -> None:
    made = module()
    before = {name: id(tensor) for name, tensor in [*made.named_parameters(), *made.named_buffers()]}
    others = {"0.weight": torch.full((2, 2), 3.0), "1.running_mean": torch.full((2,), 5.0)}
    with suppress(ZeroDivisionError), tensors_replaced(made, others):
        assert made[0].weight.tolist() == [[3.0, 3.0], [3.0, 3.0]]
        assert isinstance(made[0].weight, nn.Parameter)
        assert made[1].running_mean.tolist() == [5.0, 5.0]
        raise ZeroDivisionError
    assert {name: id(tensor) for name, tensor in [*made.named_parameters(), *made.named_buffers()]} == before


def test_weights_are_loaded_by_their_names_in_the_model_and_only_floats_are_cast() -> None:
    tensors = {"body.0.weight": torch.eye(2), "body.1.num_batches_tracked": torch.tensor(7)}

    class Stored:
        def names(self) -> list[str]:
            return list(tensors)

        def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
            return tuple(tensors[name].shape), tensors[name].dtype

        def get(self, name: str) -> torch.Tensor:
            return tensors[name]

    made = module().to("meta")
    with weights_loaded(made, "body", Stored(), torch.device("cpu"), torch.float64, skip=("body.0.b",)):
        assert made[0].weight.dtype == torch.float64
        assert made[0].weight.tolist() == [[1.0, 0.0], [0.0, 1.0]]
        assert (made[1].num_batches_tracked.item(), made[1].num_batches_tracked.dtype) == (7, torch.int64)
        assert made[0].bias.is_meta
    assert all(tensor.is_meta for tensor in [*made.parameters(), *made.buffers()])
