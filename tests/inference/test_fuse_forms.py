"""Fused linears of all forms: same numbers and same weights, whatever is done with the model."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from families import FAMILIES, linear_targets, tiny_model, tiny_tokens
from mixed import COLUMNS, DENSE, MIXED, PAIR, ROWS, mixed_model, model_with, narrower
from svdllm import fuse_factors

MIXES = {
    "mixed": MIXED,
    "otherwise": (DENSE, ROWS, ROWS, COLUMNS),
    "rows": (ROWS,),
    "columns": (COLUMNS,),
    "two forms": (COLUMNS, PAIR),
}


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    return model(input_ids=tiny_tokens() if ids is None else ids).logits


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_and_weights_stay(family: str, mix: str) -> None:
    """For many tokens, and for one; biases, groups of heads, fused projections, shared keys."""
    model, plain = (mixed_model(family, forms=MIXES[mix]).double() for _ in range(2))
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    fuse_factors(model)
    for ids in (tiny_tokens(), tiny_tokens(1, 1)):
        assert_same(logits(model, ids), logits(plain, ids))
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], weight) for name, weight in state.items())


def test_what_is_not_written_is_not_read() -> None:
    """Buffers are filled with NaN before they are used."""
    model, plain = mixed_model("qwen2").double(), mixed_model("qwen2").double()
    fuse_factors(model)
    torch.use_deterministic_algorithms(True)  # new tensors are filled with NaN
    try:
        found = logits(model)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(found, logits(plain))


def test_moved_cast_copied_and_loaded_into() -> None:
    """The orders of the other weights are others, too."""
    model, other = mixed_model("llama"), mixed_model("llama", seed=3)
    expected, others = (logits(each.double()) for each in (mixed_model("llama"), other))
    fuse_factors(model)
    copied = copy.deepcopy(model)
    assert_same(logits(model.double()), expected)
    model.load_state_dict(other.state_dict())
    assert_same(logits(model), others)
    assert_same(logits(copied.double()), expected)
    copied.load_state_dict(other.state_dict(), assign=True)
    assert_same(logits(copied), others)


def test_gradients_are_the_ordinary_ones() -> None:
    model, plain = mixed_model("llama").double(), mixed_model("llama").double()
    fuse_factors(model)
    for each in (model, plain):
        each(input_ids=tiny_tokens(), labels=tiny_tokens()).loss.backward()
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert_same(parameter.grad, expected[name].grad)


def test_gradients_of_inputs_alone() -> None:
    model, plain = (mixed_model("llama").double().requires_grad_(False) for _ in range(2))
    fuse_factors(model)
    grads = []
    for each in (model, plain):
        embedded = each.get_input_embeddings()(tiny_tokens()).requires_grad_()
        each(inputs_embeds=embedded, labels=tiny_tokens()).loss.backward()
        grads.append(embedded.grad)
    assert_same(*grads)


def test_orders_that_change_nothing_need_no_gather() -> None:
    """As the writer of a checkpoint leaves them for ``down_proj``; the input is not changed."""
    names = [name for name in linear_targets(tiny_model("llama")) if name.endswith("down_proj")]
    model, plain = (model_with("llama", dict.fromkeys(names, COLUMNS)).double() for _ in range(2))
    for each in (model, plain):
        for name in names:
            order = each.get_submodule(name).order
            order.copy_(torch.arange(len(order)))
    fuse_factors(model)
    x = torch.randn(3, 48, dtype=torch.float64)
    before = x.clone()
    with torch.no_grad():
        assert_same(model.get_submodule(names[0])(x), plain.get_submodule(names[0])(x))
    assert torch.equal(x, before)
    assert operations(model)["aten::index_select"] == operations(tiny_model("llama"))["aten::index_select"]
    assert_same(logits(model), logits(plain))


def test_joint_keys_and_values_packed_by_columns() -> None:
    """One first factor and one order for both: one latent."""
    settings = {
        "shared_factors": {f"model.layers.{i}.self_attn.v_proj": f"model.layers.{i}.self_attn.k_proj" for i in (0, 1)}
    }
    forms = {f"model.layers.{i}.self_attn.{p}_proj": COLUMNS for i in (0, 1) for p in "kv"}
    model, plain = (model_with("llama", forms, **settings).double() for _ in range(2))
    for each in (model, plain):
        for layer in each.model.layers:
            layer.self_attn.v_proj.order.copy_(layer.self_attn.k_proj.order)
    fuse_factors(model)
    assert_same(logits(model), logits(plain))
    assert operations(model)["aten::addmm_"] == 2


def operations(model: Any) -> Counter[str]:
    """How often a profiler sees each operation of torch in one forward pass."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        logits(model)
    return Counter(event.name for event in profiler.events())


@pytest.mark.parametrize(
    ("forms", "gathers"),
    [
        ((ROWS,), 4),  # of the outputs of q, k, v; o; gate, up; down
        ((COLUMNS,), 4),  # of their inputs
        ((ROWS, PAIR, DENSE, COLUMNS, COLUMNS, ROWS, DENSE), 4),  # q; o; gate and up, one each
    ],
)
def test_one_gather_a_group_and_no_copy(forms: Any, gathers: int) -> None:
    model, dense = mixed_model("llama", forms=forms), tiny_model("llama")
    layers, expected = len(model.model.layers), operations(dense)
    fuse_factors(model)
    found = operations(model)
    for name in ("aten::copy_", "aten::clone", "aten::cat", "aten::contiguous"):
        assert found[name] == expected[name], name
    assert found["aten::index_select"] == expected["aten::index_select"] + gathers * layers


def test_narrower_mlps_take_part() -> None:
    """They are dense linears; beside a packed linear of the same group they join its product."""
    names = list(linear_targets(tiny_model("llama")))
    forms = narrower(names) | {names[0]: ROWS}
    forms[next(name for name in names if name.endswith("1.mlp.up_proj"))] = {**COLUMNS, "out_features": 40}
    model, plain = (model_with("llama", forms).double() for _ in range(2))
    assert fuse_factors(model) == 2
    assert_same(logits(model), logits(plain))


def test_compiles_into_one_graph() -> None:
    model, plain = (mixed_model("llama", overrides={"num_hidden_layers": 1}) for _ in range(2))
    fuse_factors(model)
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1
