"""What the benchmark of mixtures measures: nothing of a model beside itself, routing by the experts' own numbers."""

from __future__ import annotations

import pytest
import torch

from families import tiny_model, tiny_tokens
from mixture import Watched
from mixture_training import batches


def test_a_model_beside_itself_differs_in_nothing() -> None:
    model, ids = tiny_model("mixtral").eval(), tiny_tokens()
    dense = Watched(model, ids)
    found = Watched(model, ids).beside(dense)
    assert (found["gap"], found["kl"], found["routed_elsewhere"]) == (0, 0, 0)
    losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in ids]
    assert found["perplexity"] == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-5)


def test_tokens_that_are_routed_elsewhere_are_counted_by_the_numbers_of_the_source() -> None:
    model, ids = tiny_model("mixtral").eval(), tiny_tokens()
    dense = Watched(model, ids)
    layer = model.model.layers[0].mlp
    with torch.no_grad():  # the same experts in another order
        order = [2, 0, 3, 1]
        layer.gate.weight.copy_(layer.gate.weight[order].clone())
        for tensor in (layer.experts.gate_up_proj, layer.experts.down_proj):
            tensor.copy_(tensor[order].clone())
    name = "model.layers.0.mlp.experts"
    assert Watched(model, ids, {name: order}).beside(dense)["routed_elsewhere"] == 0
    assert Watched(model, ids).beside(dense)["routed_elsewhere"] > 0.3


def test_windows_are_of_the_text() -> None:
    text = torch.arange(100)
    drawn = next(batches(text, 5, 8, torch.Generator().manual_seed(0)))
    assert drawn.shape == (5, 8)
    assert bool((drawn.diff(dim=1) == 1).all())
