"""MLPs as they are found, against lists written by hand, and narrower ones against features that are zero."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from transformers import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from families import ATTENTIONS, FAMILIES, tiny_config, tiny_model, tiny_tokens
from svdllm.common.memory import peak_bytes
from svdllm.models.discover import discover
from svdllm.models.joint_keys_and_values import with_joint_keys_and_values
from svdllm.models.linears import linear_shape, linears_of
from svdllm.models.mlps import find_mlps
from svdllm.models.skeleton import build_skeleton
from svdllm.models.structure import Mlp, Structure, Target

GATED = (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
FUSED = (("mlp.gate_up_proj",), "mlp.down_proj")
PLAIN = (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h")
EXPECTED = {
    **dict.fromkeys([*FAMILIES, *ATTENTIONS], GATED),
    **dict.fromkeys(("phi3", "glm"), FUSED),
    **dict.fromkeys(("gpt_neox", "falcon"), PLAIN),
    "opt": (("fc1",), "fc2"),
    "gpt2": (("mlp.c_fc",), "mlp.c_proj"),
}
_SIZES = {"vocab_size": 128, "hidden_size": 32, "pad_token_id": 0}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_NAMED_ALIKE = {**_SIZES, **_HEADS, "num_hidden_layers": 2, "intermediate_size": 48}
# Families that the helpers of these tests do not have.
OTHERS: dict[str, tuple[dict[str, Any], Any]] = {
    "bloom": ({**_SIZES, "n_layer": 2, "n_head": 4}, PLAIN),
    "gptj": ({**_SIZES, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, (("mlp.fc_in",), "mlp.fc_out")),
    "phi": (_NAMED_ALIKE, (("mlp.fc1",), "mlp.fc2")),
    "mpt": ({**_SIZES, "n_heads": 4, "n_layers": 2}, (("ffn.up_proj",), "ffn.down_proj")),
    "starcoder2": (_NAMED_ALIKE, (("mlp.c_fc",), "mlp.c_proj")),
    "gemma2": ({**_NAMED_ALIKE, "head_dim": 8, "query_pre_attn_scalar": 8}, GATED),
    "modernbert-decoder": ({**_NAMED_ALIKE, "cls_token_id": 1, "sep_token_id": 2}, (("mlp.Wi",), "mlp.Wo")),
    "bitnet": (_NAMED_ALIKE, None),  # has a norm over the inner features
}


def skeleton_of(family: str) -> Any:
    return build_skeleton(CONFIG_MAPPING[family](**OTHERS[family][0]) if family in OTHERS else tiny_config(family))


@pytest.mark.parametrize("family", [*FAMILIES, *ATTENTIONS, *OTHERS])
def test_every_block_has_the_mlp_that_is_expected(family: str):
    skeleton = skeleton_of(family)
    structure = discover(skeleton)
    expected = EXPECTED[family] if family in EXPECTED else OTHERS[family][1]
    found = [
        (tuple(name.removeprefix(f"{block}.") for name in mlp.producers), mlp.consumer.removeprefix(f"{block}."))
        for mlp in structure.mlps
        for block in [structure.blocks[mlp.block]]
    ]
    assert found == [expected] * len(structure.blocks) * (expected is not None)
    for mlp in structure.mlps:
        assert linear_shape(skeleton.get_submodule(mlp.consumer))[1] == mlp.width
        rows = {linear_shape(skeleton.get_submodule(name))[0] for name in mlp.producers}
        assert rows == {mlp.width * (2 if expected in (FUSED, (("mlp.Wi",), "mlp.Wo")) else 1)}


def test_they_are_found_where_the_caller_wants_no_gradients():
    skeleton = skeleton_of("llama")
    with torch.no_grad():
        assert discover(skeleton).mlps == discover(skeleton_of("llama")).mlps != ()


def test_names_join_the_linears():
    assert discover(skeleton_of("llama")).mlps[1].name == "model.layers.1.mlp.gate_proj+up_proj+down_proj"
    assert discover(skeleton_of("opt")).mlps[0].name == "model.decoder.layers.0.fc1+fc2"


@pytest.mark.parametrize("family", [*FAMILIES, *ATTENTIONS])
def test_a_narrower_mlp_computes_what_zeros_in_place_of_its_other_features_give(family: str):
    """With real linears of smaller width, in an order of their own."""
    model, tokens = tiny_model(family), tiny_tokens()
    zeroed = tiny_model(family)
    generator = torch.Generator().manual_seed(2)
    for mlp in discover(build_skeleton(model.config)).mlps:
        order = torch.randperm(mlp.width, generator=generator)
        kept, left_out = order[: mlp.width // 2], order[mlp.width // 2 :]
        for name in mlp.producers:
            narrow_rows(model.get_submodule(name), kept, mlp.width)
        narrow_columns(model.get_submodule(mlp.consumer), kept)
        consumer = zeroed.get_submodule(mlp.consumer)
        as_rows(consumer)[:, left_out] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, zeroed(tokens).logits, rtol=1e-4, atol=1e-5)


def as_rows(linear: Any) -> Tensor:
    """The weight as ``out x in``, as a view."""
    return linear.weight.data.mT if isinstance(linear, Conv1D) else linear.weight.data


def set_weight(linear: Any, weight: Tensor) -> None:
    linear.weight = nn.Parameter((weight.mT if isinstance(linear, Conv1D) else weight).contiguous())


def narrow_rows(linear: Any, kept: Tensor, width: int) -> None:
    rows = torch.cat([kept + start for start in range(0, linear_shape(linear)[0], width)])
    set_weight(linear, as_rows(linear)[rows])
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.data[rows])
    if isinstance(linear, Conv1D):
        linear.nf = len(rows)


def narrow_columns(linear: Any, kept: Tensor) -> None:
    set_weight(linear, as_rows(linear)[:, kept])


class Block(nn.Module):
    """A residual block of a kind that a test chooses."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.fused, self.square, self.gate = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 1)
        self.scale = nn.Parameter(torch.ones(12))
        self.norm = nn.RMSNorm(12, elementwise_affine=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + getattr(self, self.kind)(hidden_states)

    def plain(self, x: Tensor) -> Tensor:
        return self.c(gelu(self.a(x)))

    def gated(self, x: Tensor) -> Tensor:
        return self.c(silu(self.a(x)) * self.b(x))

    def halves(self, x: Tensor) -> Tensor:
        up, gate = self.fused(x).chunk(2, dim=-1)
        return self.c(up * silu(gate))

    def scaled_by_token(self, x: Tensor) -> Tensor:
        return self.c(gelu(self.a(x)) * x.mean(-1, keepdim=True).sigmoid())

    def one_linear_twice(self, x: Tensor) -> Tensor:
        return self.c(gelu(self.a(x)) + gelu(self.a(-x)))

    def interleaved(self, x: Tensor) -> Tensor:
        fused = self.fused(x)
        return self.c(fused[..., ::2] * silu(fused[..., 1::2]))

    def fixed_split(self, x: Tensor) -> Tensor:
        up, gate = self.fused(x).split(12, dim=-1)
        return self.c(up * silu(gate))

    def normed(self, x: Tensor) -> Tensor:
        return self.c(self.norm(gelu(self.a(x))))

    def normalised(self, x: Tensor) -> Tensor:
        return self.c(self.a(x).softmax(-1))

    def own_scales(self, x: Tensor) -> Tensor:
        return self.c(gelu(self.a(x)) * self.scale)

    def other_reader(self, x: Tensor) -> Tensor:
        inner = self.a(x)
        return self.c(gelu(inner)) + inner[..., :8]

    def sum_is_read(self, x: Tensor) -> Tensor:
        inner = self.a(x)
        return self.c(gelu(inner)) * inner.mean()

    def two_readers(self, x: Tensor) -> Tensor:
        inner = silu(self.a(x)) * self.b(x)
        return self.c(inner) + self.square(inner.mean(-1, keepdim=True).expand(x.shape))

    def residual(self, x: Tensor) -> Tensor:
        return self.c(gelu(self.a(x)) + torch.cat([x, x[..., :4]], dim=-1))

    def called_twice(self, x: Tensor) -> Tensor:
        return self.c(gelu(self.a(x))) + self.c(gelu(self.a(-x)))

    def gate_of_one(self, x: Tensor) -> Tensor:
        return self.c(gelu(self.a(x)) * self.gate(x).sigmoid())

    def heads(self, x: Tensor) -> Tensor:
        inner = self.a(x).unflatten(-1, (3, 4))
        return self.c((inner.mean(-1, keepdim=True) * inner).flatten(-2))

    def shift(self, x: Tensor) -> Tensor:
        return self.c(gelu(self.a(x)).roll(1, dims=-1))


def found_in(block: nn.Module, ignored: tuple[str, ...] = ()) -> tuple[Mlp, ...]:
    """The MLPs of a model of one block."""
    model = nn.ModuleDict({"block": block})
    targets = tuple(
        Target(name=name, block=0, in_features=i, out_features=o, has_bias=True, is_conv1d=False, group=name)
        for name, linear in linears_of(model)
        for o, i in [linear_shape(linear)]
        if name not in ignored
    )
    structure = Structure(blocks=("block",), targets=targets, num_outputs=(0,))
    return find_mlps(model, structure, [((torch.zeros(1, 5, 8),), {})])


@pytest.mark.parametrize(
    ("kind", "producers"),
    [
        ("plain", ("block.a",)),
        ("gated", ("block.a", "block.b")),
        ("halves", ("block.fused",)),
        ("scaled_by_token", ("block.a",)),
        ("one_linear_twice", ("block.a",)),
        ("interleaved", ("block.fused",)),
    ],
)
def test_an_mlp_is_found_by_what_it_does(kind: str, producers: tuple[str, ...]):
    (mlp,) = found_in(Block(kind))
    assert (mlp.producers, mlp.consumer, mlp.width) == (producers, "block.c", 12)
    assert mlp.interleaved == (kind == "interleaved")


@pytest.mark.parametrize(
    "kind",
    [
        *("fixed_split", "normed", "normalised", "own_scales", "other_reader", "sum_is_read"),
        *("two_readers", "residual", "called_twice", "gate_of_one", "heads", "shift"),
    ],
)
def test_linears_whose_features_cannot_be_removed_are_no_mlp(kind: str):
    assert found_in(Block(kind)) == ()


def test_a_linear_is_in_one_mlp_only():
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 8)

        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.third(gelu(self.second(gelu(self.first(hidden_states)))))

    assert [mlp.name for mlp in found_in(Chain())] == ["block.first+second"]


def test_no_mlp_has_an_ignored_linear():
    assert found_in(Block("gated"), ("block.b",)) == ()
    assert [mlp.block for mlp in discover(skeleton_of("llama"), [r"layers\.0\.mlp\.down"]).mlps] == [1]


def test_a_block_that_fails_on_random_values_has_no_mlp():
    class Strict(Block):
        def plain(self, x: Tensor) -> Tensor:
            if x.abs().sum() > 0:
                raise ArithmeticError("zeros only")
            return super().plain(x)

    assert found_in(Strict("plain")) == ()


def test_joint_keys_and_values_leave_the_mlps_of_other_linears():
    structure = discover(skeleton_of("llama"))
    values = structure.targets[2].name
    of_joint = Mlp(name="joint", block=0, producers=(values,), consumer=structure.targets[3].name, width=16)
    both = replace(structure, mlps=(of_joint, *structure.mlps))
    assert values.endswith("v_proj")
    assert with_joint_keys_and_values(both).mlps == structure.mlps


def test_they_are_found_where_gradients_are_switched_off() -> None:
    skeleton = build_skeleton(tiny_config("llama"))
    with torch.no_grad():
        found = discover(skeleton).mlps
    assert found == discover(skeleton).mlps
    assert found


def test_stacks_of_large_experts_are_tried_without_their_memory():
    skeleton = build_skeleton(tiny_config("mixtral", num_local_experts=64, hidden_size=512, intermediate_size=2048))
    discover(build_skeleton(tiny_config("mixtral")))
    before = peak_bytes()
    discover(skeleton)
    assert peak_bytes() - before < 2**28  # the experts of a layer have 2**28 bytes and more
