"""Experts one by one: what they compute, how their weights are read, and grouped products of all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import linear_targets, tiny_model, tiny_tokens
from svdllm.common.errors import CheckpointError
from svdllm.models.converted import StoredTensor
from svdllm.models.experts import Routing, Stacked, expert_tensors, stacked_layout, untouched
from svdllm.models.low_rank.lowrank import (
    PackedLinear,
    SplitExperts,
    check_tensor_parallel,
    split_experts,
    swap_linears,
)
from svdllm.models.skeleton import build_skeleton
from svdllm.models.weights import MemoryWeights, SafetensorsWeights

OPTIONS: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {"moe_layers": [0, 1], "num_local_experts": 4, "num_experts_per_tok": 1},  # repeated tokens
}
STACKED = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe", "granitemoe", "gpt_oss", "llama4_text"]


def model_of(family: str) -> Any:
    return tiny_model(family, **OPTIONS.get(family, {}))


def experts_of(model: nn.Module) -> dict[str, SplitExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SplitExperts)}


@pytest.mark.parametrize("family", STACKED)
def test_split_experts_compute_what_transformers_does(family: str) -> None:
    model, ids = model_of(family), tiny_tokens()
    model.config._experts_implementation = "eager"
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        split_experts(model)
        found = model(input_ids=ids, use_cache=False).logits
    assert experts_of(model)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


# Joined by pairs, by names, and stored stacked.
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "llama4_text"])
def test_the_weights_of_one_expert_are_read_alone(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(family)
    model.save_pretrained(tmp_path)
    skeleton = build_skeleton(model.config)
    read: list[str] = []
    whole, part = StoredTensor.read, StoredTensor.read_part
    monkeypatch.setattr(StoredTensor, "read", lambda self: (read.append(self.key), whole(self))[1])
    monkeypatch.setattr(
        StoredTensor, "read_part", lambda self, at: (read.append(f"part of {self.key}"), part(self, at))[1]
    )
    weights, in_memory = SafetensorsWeights(tmp_path, skeleton), MemoryWeights(model, skeleton)
    split_experts(model)
    state = model.state_dict()
    for name, place in expert_tensors(model).items():
        read.clear()
        torch.testing.assert_close(weights.get(name), state[name], atol=0, rtol=0)
        torch.testing.assert_close(in_memory.get(name), state[name], atol=0, rtol=0)
        if family in ("gpt_oss", "llama4_text"):
            assert len(read) == 1
            assert read[0].startswith("part of ")
        else:
            assert len(read) == (2 if "gate_up" in name else 1)
            assert all(f"experts.{place.index}." in key for key in read)


@pytest.mark.parametrize("stored", [True, False], ids=["files", "memory"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_expert_counts_that_differ_from_the_config_are_an_error(family: str, stored: bool, tmp_path: Path) -> None:
    model = tiny_model(family, num_local_experts=4, num_experts_per_tok=2)
    model.config.num_local_experts = 5
    skeleton = build_skeleton(model.config)
    if stored:
        model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"experts.* holds 4 experts, the config asks for 5\. "):
        SafetensorsWeights(tmp_path, skeleton) if stored else MemoryWeights(model, skeleton)


def test_layers_that_no_form_touches_are_stacked_again() -> None:
    model = model_of("gpt_oss")
    expected = {name: tensor for name, tensor in model.state_dict().items() if "layers.1" in name}
    split_experts(model)
    state = model.state_dict()

    class Tensors:
        def get(self, name: str) -> Tensor:
            return state[name]

    places = untouched(expert_tensors(model), ["model.layers.0.mlp.experts.2.down_proj"])
    layout = stacked_layout({name: (tuple(t.shape), t.dtype) for name, t in state.items()}, places)
    tensors = Stacked(Tensors(), places)
    assert "model.layers.0.mlp.experts.2.down_proj.bias" in layout
    assert {name for name in layout if "layers.1" in name} == set(expected)
    for name, tensor in expected.items():
        assert layout[name] == (tuple(tensor.shape), tensor.dtype)
        torch.testing.assert_close(tensors.get(name), tensor, atol=0, rtol=0)


def test_a_second_run_is_routed_as_the_first() -> None:
    model = model_of("mixtral")
    split_experts(model)
    routing = Routing(model)
    given: list[Tensor] = []
    for module in experts_of(model).values():
        # Behind the hooks of the routing, which are the last to be added.
        module.register_forward_hook(lambda module, args, output: given.extend(args[1:]))
    with torch.no_grad():
        with routing.recorded():
            model(input_ids=tiny_tokens(seed=1))
        with routing.replayed():
            model(input_ids=tiny_tokens(seed=2))
        model(input_ids=tiny_tokens(seed=2))
    first, second, third = given[:4], given[4:8], given[8:]
    assert all(map(torch.equal, first, second))
    assert not all(map(torch.equal, first, third))


def _with_forms(family: str, form: str) -> Any:
    """A model with split experts, factorised at random: pairs of a rank for each expert, or packed."""
    model = model_of(family)
    split_experts(model)
    forms: dict[str, dict[str, Any]] = {}
    for name in (name for name in linear_targets(model) if ".experts." in name and form != "dense"):
        index = int(name.split(".")[-2])
        packed = {"form": "packed", "rank": 8, "side": form}
        forms[name] = {"form": "pair", "rank": 4 + index} if form == "pair" else packed
    swap_linears(model, forms)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.order = torch.randperm(len(module.order), generator=generator).int()
    for name, parameter in model.named_parameters():
        if "svd" in name:
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])  # without and with biases
@pytest.mark.parametrize("form", ["dense", "pair", "rows", "columns"])
def test_grouped_products_compute_what_the_experts_do(family: str, form: str) -> None:
    model, ids = _with_forms(family, form), tiny_tokens()

    def computed() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        model(input_ids=ids, use_cache=False).logits.square().sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return logits, grads

    expected, expected_grads = computed()
    for module in experts_of(model).values():
        module.grouped = True
    found, grads = computed()
    assert all(module._groups() is not None for module in experts_of(model).values())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, atol=1e-4, rtol=1e-3, msg=name)
    # Weights that are loaded into the model are those of the stacks; after a cast, stacks are made anew.
    with torch.no_grad():
        model.load_state_dict(
            {
                name: 2 * t if "experts.1." in name and t.is_floating_point() else t
                for name, t in model.state_dict().items()
            }
        )
        doubled = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(model.double().float()(input_ids=ids, use_cache=False).logits, doubled)
    assert not torch.allclose(doubled, expected)


def test_split_experts_are_refused_by_several_processes() -> None:
    model = _with_forms("qwen3_moe", "dense")
    model.config.svdllm_forms = {}
    with pytest.raises(ValueError, match="Low-rank experts cannot be split between 2 processes, and 2 layers"):
        check_tensor_parallel(model, 2)


def test_experts_that_differ_or_are_watched_are_computed_one_by_one() -> None:
    model = _with_forms("qwen3_moe", "dense")
    (experts, others) = experts_of(model).values()
    swap_linears(model, {"model.layers.0.mlp.experts.1.down_proj": {"form": "pair", "rank": 4}})
    assert experts._groups() is None
    assert others._groups() is not None
    others.experts[0].down_proj.register_forward_pre_hook(lambda *_: None)
    assert others._groups() is None
