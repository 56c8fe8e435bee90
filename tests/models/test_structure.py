"""Blocks, linears and groups as they are found, against lists written by hand; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from families import FAMILIES, linear_targets, tiny_config
from runs import pair_params
from svdllm.common.errors import InputError, UnsupportedModelError
from svdllm.models.discover import discover
from svdllm.models.hooks import input_groups, replaced, to_device
from svdllm.models.linears import find_blocks, is_linear, linears_of
from svdllm.models.skeleton import build_skeleton
from svdllm.models.structure import Structure

TINY = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def skeleton_of(family: str, **overrides: Any) -> Any:
    return build_skeleton(tiny_config(family, **overrides))


def groups_of(structure: Structure, block: int) -> list[list[str]]:
    """The groups of a block: the names without their prefix, in the order of the model; each group once."""
    groups: dict[str, list[str]] = {}
    for target in structure.block_targets(block):
        groups.setdefault(target.group, []).append(target.name.removeprefix(f"{structure.blocks[block]}."))
    return sorted(sorted(group) for group in groups.values())


LLAMA_GROUPS = [
    ["mlp.down_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
]
GROUPS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "stablelm"), LLAMA_GROUPS),
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    "gpt_neox": [["attention.dense"], ["attention.query_key_value"], ["mlp.dense_4h_to_h"], ["mlp.dense_h_to_4h"]],
    "phi3": [["mlp.down_proj"], ["mlp.gate_up_proj"], ["self_attn.o_proj"], ["self_attn.qkv_proj"]],
    "opt": [["fc1"], ["fc2"], ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"], ["self_attn.out_proj"]],
    # Attention and feed-forward run in parallel, from one norm.
    "falcon": [
        ["mlp.dense_4h_to_h"],
        ["mlp.dense_h_to_4h", "self_attention.query_key_value"],
        ["self_attention.dense"],
    ],
}
_GEMMA4 = [
    ["mlp.down_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["per_layer_input_gate"],
    ["per_layer_projection"],
    ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
]
_QUERIES_ONLY = [[name for name in group if not name.endswith(("k_proj", "v_proj"))] for group in _GEMMA4]
GROUPS_BY_BLOCK = {"gemma4_text": [_GEMMA4, _GEMMA4, sorted(_QUERIES_ONLY), sorted(_QUERIES_ONLY)]}
BLOCKS = {
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
    "falcon": "transformer.h",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_linears_and_groups(family: str):
    skeleton = skeleton_of(family)
    structure = discover(skeleton)
    stack = BLOCKS.get(family, "model.layers")
    groups = GROUPS_BY_BLOCK.get(family) or [GROUPS[family]] * 2
    assert structure.blocks == tuple(f"{stack}.{index}" for index in range(len(groups)))
    assert [groups_of(structure, index) for index in range(len(groups))] == groups
    assert structure.ignored == ()
    linears = linear_targets(skeleton)
    assert [target.name for target in structure.targets] == list(linears)
    for target in structure.targets:
        module = linears[target.name]
        shape = tuple(module.weight.shape)
        assert target.is_conv1d == isinstance(module, Conv1D) == (family == "gpt2")
        assert (target.in_features, target.out_features) == (shape if target.is_conv1d else shape[::-1])
        assert target.has_bias == (module.bias is not None)
        assert target.group in {t.name for t in structure.block_targets(target.block)}
    assert structure.num_target_params == sum(module.weight.numel() for module in linears.values())


def test_two_norms_make_two_groups_of_a_parallel_block():
    structure = discover(
        skeleton_of("falcon", new_decoder_architecture=True, num_ln_in_parallel_attn=2, num_kv_heads=2)
    )
    assert groups_of(structure, 0) == sorted([name] for group in GROUPS["falcon"] for name in group)


def test_shapes_of_grouped_query_attention():
    by_name = {t.name: t for t in discover(skeleton_of("llama")).targets}
    k_proj = by_name["model.layers.1.self_attn.k_proj"]
    assert (k_proj.out_features, k_proj.in_features, k_proj.block) == (16, 32, 1)
    assert (k_proj.num_weights, k_proj.full_rank, k_proj.break_even_rank, pair_params(k_proj, 5)) == (512, 16, 10, 240)


@pytest.mark.parametrize(("family", "expected"), [("llama", 0), ("falcon", 2), ("gpt2", 0)])
def test_how_many_outputs_blocks_have(family: str, expected: int):
    assert discover(skeleton_of(family)).num_outputs == (expected, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_skeleton_is_left_as_it_was(family: str):
    skeleton = skeleton_of(family)
    before = [(name, id(module)) for name, module in skeleton.named_modules()]
    parameters = [(name, id(p)) for name, p in skeleton.named_parameters(remove_duplicate=False)]
    discover(skeleton)
    assert [(name, id(module)) for name, module in skeleton.named_modules()] == before
    assert [(name, id(p)) for name, p in skeleton.named_parameters(remove_duplicate=False)] == parameters
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in skeleton.modules())


def test_discovering_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    discover(skeleton_of("llama"))
    assert torch.equal(torch.get_rng_state(), before)


def test_ignored_linears_leave_the_rest_grouped():
    structure = discover(skeleton_of("llama"), [r"q_proj", r"layers\.1\.mlp"])
    assert groups_of(structure, 0) == [
        ["mlp.down_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
    ]
    assert groups_of(structure, 1) == [["self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
    assert structure.ignored == (
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    )
    # The group is named after a linear that is compressed, not after the ignored one.
    assert {t.group for t in structure.targets} <= {t.name for t in structure.targets}
    assert len(structure.block_targets(0)) == 6


def test_a_whole_block_may_be_ignored():
    structure = discover(skeleton_of("llama"), [r"layers\.0\."])
    assert structure.block_targets(0) == []
    assert len(structure.blocks) == 2


def test_ignore_patterns_that_are_wrong():
    with pytest.raises(InputError, match=r"--ignore 'gone' matches none of the 14 linears; .* and 6 more"):
        discover(skeleton_of("llama"), ["q_proj", "gone"])
    with pytest.raises(InputError, match=r"--ignore 'self_attn mlp' matches every linear: nothing is left"):
        discover(skeleton_of("llama"), ["self_attn", "mlp"])
    with pytest.raises(InputError, match=r"'\(' is not a regular expression"):
        discover(skeleton_of("llama"), ["("])


# --- what stays as it is ---


def parts_of(structure: Structure) -> dict[str, tuple[str, int]]:
    """Class -> why its modules stay as they are, and the number of their parameters."""
    return {part.kind: (part.reason, part.params) for part in structure.dense_parts}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_the_blocks_is_accounted_for(family: str):
    skeleton = skeleton_of(family)
    structure = discover(skeleton, ["q_proj"] if family == "llama" else [])
    inside = [p for name in structure.blocks for p in skeleton.get_submodule(name).parameters()]
    assert structure.num_block_params == sum(parameter.numel() for parameter in inside)
    biases = sum(target.out_features for target in structure.targets if target.has_bias)
    rest = sum(part.params for part in structure.dense_parts)
    assert structure.num_target_params + biases + rest == structure.num_block_params
    assert sum(part.share for part in structure.dense_parts) == pytest.approx(rest / structure.num_block_params)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_targets_and_their_router_stays_as_it_is(family: str):
    experts = {"num_local_experts": 4} if family == "mixtral" else {"num_experts": 4, "moe_intermediate_size": 48}
    config = CONFIG_MAPPING[family](
        **TINY, num_key_value_heads=2, intermediate_size=48, num_experts_per_tok=2, **experts
    )
    structure = discover(build_skeleton(config))
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    experts = [f"experts.{n}.{leaf}" for n in range(4) for leaf in ("gate_up_proj", "down_proj")]
    found = [target.name.removeprefix("model.layers.1.") for target in structure.block_targets(1)]
    assert found == [*(f"self_attn.{leaf}" for leaf in attention), *(f"mlp.{name}" for name in experts)]
    pool = structure.pools["model.layers.1.mlp.experts.down_proj"]
    assert pool == [f"model.layers.1.mlp.experts.{n}.down_proj" for n in range(4)]
    assert {mlp.width for mlp in structure.mlps} == {48}
    assert structure.pools["model.layers.0.mlp.experts.gate_up_proj+down_proj"] == [
        mlp.name for mlp in structure.mlps if mlp.block == 0
    ]
    stem = "Mixtral" if family == "mixtral" else "Qwen3Moe"
    assert parts_of(structure)[f"{stem}TopKRouter"] == ("not a linear", 2 * 4 * 32)


def test_state_space_weights_and_convolutions_stay_as_they_are():
    config = CONFIG_MAPPING["mamba"](vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4)
    structure = discover(build_skeleton(config))
    names = [t.name.removeprefix("backbone.layers.1.mixer.") for t in structure.block_targets(1)]
    assert names == ["in_proj", "x_proj", "out_proj"]  # the weight of dt_proj is multiplied without calling it
    assert parts_of(structure) == {
        "MambaMixer": ("not a linear", 2 * (64 * 4 + 64)),  # A and D
        "Conv1d": ("not a linear", 2 * (64 * 4 + 64)),
        "Linear": ("not called in a trial pass", 2 * (2 * 64 + 64)),
        "MambaRMSNorm": ("not a linear", 2 * 32),
    }


def test_weights_shared_between_blocks_stay_as_they_are():
    skeleton = skeleton_of("llama")
    skeleton.model.layers[1].mlp.up_proj.weight = skeleton.model.layers[0].mlp.up_proj.weight
    structure = discover(skeleton)
    assert groups_of(structure, 1) == [["mlp.down_proj"], ["mlp.gate_proj"], *LLAMA_GROUPS[2:]]
    (part,) = [part for part in structure.dense_parts if part.kind == "Linear"]
    assert (part.reason, part.params) == ("shared with another module", 32 * 48)  # counted once


def test_a_linear_whose_weight_is_read_stays_as_it_is():
    class Reader(nn.Linear):  # Linear's own forward
        pass

    class Mlp(nn.Module):
        def __init__(self, mlp: nn.Module):
            super().__init__()
            self.mlp, self.read = mlp, Reader(32, 32, bias=False, device="meta")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mlp(self.read(x).to(self.read.weight.dtype))

    skeleton = skeleton_of("llama")
    skeleton.model.layers[0].mlp = Mlp(skeleton.model.layers[0].mlp)
    structure = discover(skeleton)
    assert parts_of(structure)["Reader"] == ("its weight is read without calling it", 32 * 32)
    assert "model.layers.0.mlp.read" not in {target.name for target in structure.targets}


def test_a_linear_that_is_never_called_stays_as_it_is():
    skeleton = skeleton_of("llama")
    skeleton.model.layers[1].spare = nn.Linear(4, 4, device="meta")
    structure = discover(skeleton)
    assert structure.ignored == ()
    assert parts_of(structure)["Linear"] == ("not called in a trial pass", 20)
    assert groups_of(structure, 1) == LLAMA_GROUPS
    assert discover(skeleton, ["spare"]).ignored == ("model.layers.1.spare",)


def test_a_linear_with_a_forward_of_its_own_is_tried():
    class Same(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input @ self.weight.T + self.bias

    class Top(nn.Linear):
        def forward(self, input: torch.Tensor) -> Any:
            return super().forward(input).topk(2)

    class Half(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) / 2

    linears = [Same(6, 4, device="meta"), Top(6, 4), Half(6, 4), Conv1D(4, 6)]
    assert list(map(is_linear, linears)) == [True, False, False, True]


def test_the_largest_stack_of_the_decoder_is_taken():
    stacks = {side: nn.ModuleList([nn.Linear(2, 2)] * 2) for side in ("first", "second")}
    stacks["second"] = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    assert find_blocks(nn.ModuleDict(stacks)) == ["second.0", "second.1"]

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.ModuleList([nn.Linear(9, 9)])
            self.text = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])})

        def get_decoder(self) -> nn.Module:
            return self.text

    assert find_blocks(Wrapper()) == ["text.layers.0"]


# --- what is refused ---


def test_a_pass_that_fails_is_one_sentence():
    skeleton = skeleton_of("llama")
    skeleton.model.layers[1].mlp = nn.Linear(48, 32, device="meta")  # takes hidden states of 32 features
    skeleton.model.norm = nn.Conv1d(1, 1, 1)
    with pytest.raises(
        UnsupportedModelError, match=r"LlamaForCausalLM is not supported: a trial pass over 8 tokens fails"
    ):
        discover(skeleton)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(
        UnsupportedModelError, match=r"Sequential has no stack of decoder blocks .* Its modules are: 0, 1\."
    ):
        find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ModuleList()))


def test_a_stack_inside_a_block_is_no_second_stack():
    inner = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])})
    assert find_blocks(nn.ModuleDict({"layers": nn.ModuleList([inner, inner])})) == ["layers.0", "layers.1"]


def test_blocks_without_linears_are_refused():
    skeleton = skeleton_of("llama")
    for layer in skeleton.model.layers:
        layer.self_attn = layer.mlp = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="The blocks of LlamaForCausalLM hold no linear layer"):
        discover(skeleton)


# --- the pieces ---


def test_is_linear_and_linears_of():
    block = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.ModuleDict({"c": Conv1D(3, 2)}), "norm": nn.LayerNorm(2)})
    assert [name for name, _ in linears_of(block, prefix="block")] == ["block.a", "block.b.c"]
    assert not is_linear(nn.Embedding(2, 3))
    assert not is_linear(nn.Conv1d(2, 3, 1))


def test_inputs_are_grouped_by_identity_not_by_value():
    first, second, third = (nn.Linear(2, 2) for _ in range(3))
    x, equal = torch.ones(1, 2), torch.ones(1, 2)
    seen: list[tuple[str, int]] = []
    named = [("first", first), ("second", second), ("third", third)]
    with input_groups(named, lambda leader, inputs: seen.append((leader, id(inputs)))) as (groups, release):
        for _ in range(2):
            first(x), second(equal), third(x)
            release()
    assert groups == {"first": "first", "second": "second", "third": "first"}
    assert seen == [("first", id(x)), ("second", id(equal))] * 2
    assert not any(module._forward_pre_hooks for _, module in named)


def test_an_input_shared_at_times_only_is_refused_and_the_hooks_are_removed():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.ones(1, 2)

    def run() -> None:
        with input_groups([("first", first), ("second", second)]) as (_, release):
            first(x), second(x)
            release()
            first(x), second(x + 1)

    with pytest.raises(UnsupportedModelError, match="second shared its input with first before and with second now"):
        run()
    assert not first._forward_pre_hooks
    assert not second._forward_pre_hooks


def test_replaced_modules_come_back_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))
    linear, relu = model[0], model[1][0]

    def run() -> None:
        with replaced(model, {"0": nn.Identity(), "1.0": nn.Tanh()}):
            assert isinstance(model[1][0], nn.Tanh)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run()
    assert model[0] is linear
    assert model[1][0] is relu


def test_to_device_moves_nested_tensors_only():
    moved = to_device({"a": [torch.ones(2), 3], "b": (None, torch.ones(1))}, "meta")
    assert moved["a"][0].is_meta
    assert moved["a"][1] == 3
    assert moved["b"][0] is None
    assert moved["b"][1].is_meta
