"""One product for the first factors of a group: same numbers and same weights, whatever is done with the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from families import FAMILIES, low_rank_model, tiny_tokens
from svdllm import fuse_factors
from svdllm.inference.fuse import FusedLinear


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    return model(input_ids=tiny_tokens() if ids is None else ids).logits


class Products(TorchDispatchMode):
    """Counts the matrix products that torch is asked for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def products(model: Any) -> int:
    with Products() as counter:
        logits(model)
    return counter.count


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_and_names_stay(family: str) -> None:
    model = low_rank_model(family)
    expected, state = logits(model), {name: weight.clone() for name, weight in model.state_dict().items()}
    fuse_factors(model)
    assert_close(logits(model), expected)
    assert_close(logits(model, tiny_tokens(1, 1)), logits(low_rank_model(family), tiny_tokens(1, 1)))
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], weight) for name, weight in state.items())


def test_three_products_less_in_every_block() -> None:
    """q, k, v: one instead of three; gate, up: one instead of two."""
    model = low_rank_model("llama")
    before = products(model)
    assert fuse_factors(model) == 2 * 2
    assert products(model) == before - 2 * 3
    assert fuse_factors(model) == 0


def test_a_linear_left_dense_takes_part() -> None:
    model = low_rank_model("llama", dense=("k_proj", "0.mlp.gate_proj", "0.mlp.up_proj"))
    expected, before = logits(model), products(model)
    assert fuse_factors(model) == 3  # gate and up of block 0 are both dense: nothing of ours to speed up
    assert products(model) == before - (2 + 2 + 1)
    assert isinstance(model.model.layers[0].self_attn.k_proj, FusedLinear)
    assert_close(logits(model), expected)


def test_moved_cast_copied_and_loaded_into() -> None:
    model, other = low_rank_model("llama"), low_rank_model("llama", seed=3)
    fuse_factors(model)
    expected = logits(model)
    copied = copy.deepcopy(model)
    assert_close(logits(model.double()).float(), expected)
    model.float()
    model.load_state_dict(other.state_dict())
    assert_close(logits(model), logits(other))
    assert_close(logits(copied), expected)
    copied.load_state_dict(other.state_dict())
    assert_close(logits(copied), logits(other))


def test_saved_as_before(tmp_path: Path) -> None:
    model = low_rank_model("llama")
    model.save_pretrained(tmp_path / "a")
    fuse_factors(model)
    model.save_pretrained(tmp_path / "b")
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "b")), logits(model))
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_gradients_are_the_ordinary_ones() -> None:
    model, plain = low_rank_model("llama"), low_rank_model("llama")
    fuse_factors(model)
    for each in (model, plain):
        each(input_ids=tiny_tokens(), labels=tiny_tokens()).loss.backward()
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad)


def test_the_same_tensor_twice_with_other_numbers() -> None:
    """A tensor that is filled anew between calls, as static buffers are, is multiplied anew."""
    model, plain = low_rank_model("llama"), low_rank_model("llama")
    fuse_factors(model)
    ours, theirs = model.model.layers[0].mlp, plain.model.layers[0].mlp
    x = torch.ones(1, 2, 32)
    with torch.no_grad():
        for value in (1.0, -2.0):
            x.fill_(value)
            torch.testing.assert_close(ours(x), theirs(x))
            torch.testing.assert_close(ours.gate_proj(x), theirs.gate_proj(x))  # gate alone, twice
            x.fill_(3 * value)
            torch.testing.assert_close(ours.gate_proj(x), theirs.gate_proj(x))
            x.fill_(5 * value)
