"""The ``svdllm`` entry of a config is read in one place, from a config or from the content of its file."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from svdllm.common.errors import CheckpointError
from svdllm.models.low_rank import low_rank_config
from svdllm.models.low_rank.factory import dense_config
from svdllm.models.low_rank.info import LowRankInfo

RANKS = {"model.layers.0.self_attn.k_proj": 4, "model.layers.0.self_attn.v_proj": 4}
SHARED = {"model.layers.0.self_attn.v_proj": "model.layers.0.self_attn.k_proj"}
ENTRY = {"format_version": 1, "base_model_type": "llama", "ranks": RANKS, "shared_factors": SHARED}


def test_a_config_and_its_file_say_the_same() -> None:
    config = low_rank_config(LlamaConfig(), ENTRY | {"source": {"id": "owner/dense"}})
    info = LowRankInfo.of(config)
    assert info == LowRankInfo.of(config.to_dict())
    assert info is not None
    assert (info.base_model_type, info.ranks, info.shared_factors) == ("llama", RANKS, SHARED)
    assert info.source == {"id": "owner/dense"}


def test_a_dense_config_has_none_and_is_its_own_dense_config() -> None:
    config = LlamaConfig()
    assert LowRankInfo.of(config) is None
    assert LowRankInfo.of({"model_type": "llama"}) is None
    assert dense_config(config) is config
    assert dense_config(low_rank_config(config, ENTRY)).model_type == "llama"


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ([], "is damaged: expected 'svdllm' to be an object with a"),
        ({}, "is damaged: expected 'svdllm' to be an object with a"),
        (ENTRY | {"base_model_type": 1}, "is damaged: expected 'svdllm' to be an object with a"),
        ({"base_model_type": "llama"}, "cannot be read: config.svdllm: this code reads"),
        (ENTRY | {"ranks": 4}, "cannot be read: config.svdllm.ranks: expected a mapping"),
        (ENTRY | {"format_version": 2}, "cannot be read: config.svdllm.forms: expected a mapping"),
    ],
)
def test_a_damaged_entry_is_named(entry: Any, what: str) -> None:
    with pytest.raises(CheckpointError, match=f"json of this model {what}"):
        LowRankInfo.of({"svdllm": entry}, "this model")
