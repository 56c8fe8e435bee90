"""Heads are found by what a block does: how many there are, which linears make them, and what else counts them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from families import tiny_config
from svdllm.models.channels import channels_of_mlps
from svdllm.models.discover import discover
from svdllm.models.heads import find_heads
from svdllm.models.skeleton import build_skeleton


def found(family: str, **overrides: Any) -> tuple[Any, Any]:
    skeleton = build_skeleton(tiny_config(family, **overrides))
    structure = discover(skeleton)
    return structure, find_heads(skeleton, structure)


@pytest.mark.parametrize(
    ("family", "groups", "counts"),
    [
        ("llama", 2, set()),
        ("qwen2", 2, set()),
        ("qwen3", 2, set()),
        ("gemma3_text", 2, set()),
        ("gpt_neox", 4, set()),
        ("opt", 4, {"num_heads"}),
        ("gpt2", 4, {"split_size"}),
        ("stablelm", 2, {"num_heads", "num_key_value_heads"}),
        ("deepseek_v3", 4, set()),
    ],
)
def test_heads_of_families(family: str, groups: int, counts: set[str]) -> None:
    _, heads = found(family)
    assert [each.num_groups for each in heads.heads] == [groups] * 2
    assert [each.block for each in heads.heads] == [0, 1]
    assert {name.rpartition(".")[2] for name in heads.heads[0].counts} == counts


def test_rows_and_columns_of_grouped_heads() -> None:
    structure, heads = found("llama")
    first = heads.heads[0]
    assert first.name == "model.layers.0.self_attn"
    assert first.consumer == "model.layers.0.self_attn.o_proj"
    owners = {name.rpartition(".")[2]: owner.tolist() for name, owner in first.producers.items()}
    assert owners == {"q_proj": [0] * 16 + [1] * 16, "k_proj": [0] * 8 + [1] * 8, "v_proj": [0] * 8 + [1] * 8}
    assert first.columns.tolist() == [0] * 16 + [1] * 16
    targets = {target.name: target for target in structure.targets}
    assert first.params_per_group(targets) == (16 + 8 + 8 + 16) * 32
    kept = torch.tensor([False, True])
    assert first.kept("model.layers.0.self_attn.k_proj", kept).tolist() == list(range(8, 16))


def test_a_fused_projection_has_rows_of_every_head_in_three_places() -> None:
    _, heads = found("gpt2")
    (owner,) = heads.heads[0].producers.values()
    assert owner.tolist() == [head for _ in range(3) for head in range(4) for _ in range(8)]


def test_latent_attention_shares_the_rotated_part_of_its_keys() -> None:
    _, heads = found("deepseek_v3")
    kept = {name.rpartition(".")[2]: int((owner < 0).sum()) for name, owner in heads.heads[0].producers.items()}
    assert kept == {"q_b_proj": 0, "kv_b_proj": 0, "kv_a_proj_with_mqa": 8 + 4}  # 8 of a latent, 4 are rotated


@pytest.mark.parametrize("family", ["phi3", "olmo2", "gpt_oss", "bloom"])
def test_heads_that_cannot_be_removed_say_why(family: str) -> None:
    _, heads = found(family)
    assert not heads.heads
    assert all("depend on each other or on their number" in why for why in heads.refused.values())
    assert heads.refused


def test_inner_features_of_fused_mlps_have_two_rows_each() -> None:
    structure, _ = found("phi3")
    each = channels_of_mlps(structure)[0]
    (owner,) = each.producers.values()
    assert owner.tolist() == [*range(48), *range(48)]
    assert each.params_per_group({target.name: target for target in structure.targets}) == 3 * 32
    assert each.sums(each.consumer, torch.ones(48)).tolist() == [1.0] * 48
