"""Rotary embeddings in ``config.json`` for readers that do not know ``rope_parameters``: old names, same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from svdllm.models.low_rank import low_rank_config
from svdllm.models.low_rank.factory import dense_config

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024, "attention_factor": 1.1, "beta_fast": 16.0}
LONG = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0], "original_max_position_embeddings": 1024}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 8.0},
    "dynamic": {"factor": 2.0},
    "yarn": YARN,
    "longrope": LONG,
    "llama3": LLAMA3,
}
# With as many rotated numbers as LONG has factors.
HEADS = {"hidden_size": 8, "num_attention_heads": 2}
LAYERS = ("full_attention", "sliding_attention")
SLIDING = ("gemma3_text", "gemma3n_text", "olmo3")
OLD_NAMES = (
    *("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "rotary_emb_base", "rotary_pct"),
    *("global_rope_theta", "local_rope_theta", "original_max_position_embeddings"),
)
FAMILIES = ("llama", "qwen2", "mistral", "stablelm", "gpt_neox", "gpt_oss", "cohere2", "olmo2", *SLIDING)


def config_of(family: str, rope: dict[str, Any] | None = None, **settings: Any) -> Any:
    base = CONFIG_MAPPING[family](**HEADS | settings | ({} if rope is None else {"rope_parameters": rope}))
    return low_rank_config(base, {"format_version": 1, "base_model_type": family, "ranks": {}})


def written(config: Any, folder: Path) -> dict[str, Any]:
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def rope_of(family: str, kind: str) -> dict[str, Any]:
    """Of a family with sliding layers, these are not scaled; in OLMo 3 they have the same theta."""
    rope = {"rope_type": kind, "rope_theta": 5e5, **SCALINGS[kind]}
    if family in ("stablelm", "gpt_neox"):
        rope["partial_rotary_factor"] = 1.0
    if family not in SLIDING:
        return rope
    local = 5e5 if family == "olmo3" else 2e4
    return {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_old_names_give_the_same_numbers(family: str, kind: str, tmp_path: Path) -> None:
    """Read by the family's own config class, which takes the old names where there are no new ones."""
    settings = {"head_dim": 4} if kind == "longrope" and "head_dim" in CONFIG_MAPPING[family]().to_dict() else {}
    config = config_of(family, rope_of(family, kind), **settings)
    fields = written(config, tmp_path)
    assert fields.pop("rope_parameters") == config.rope_parameters
    for key in ("auto_map", "svdllm", "model_type", "architectures"):
        fields.pop(key, None)
    if kind == "default":
        assert fields["rope_scaling"] is None  # gpt-oss is scaled if nothing is said
        if family == "gpt_oss":
            fields["rope_scaling"] = {"rope_type": "default"}  # None says the same to transformers 4, and nothing to 5
    read = CONFIG_MAPPING[family](**fields).rope_parameters
    for numbers in (read, *(value for value in read.values() if isinstance(value, dict))):
        numbers.pop("type", None)
    assert read == config.rope_parameters


@pytest.mark.parametrize(
    ("family", "rope", "settings", "expected"),
    [
        ("llama", {"rope_type": "default", "rope_theta": 5e5}, {}, {"rope_theta": 5e5, "rope_scaling": None}),
        (
            "llama",
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
            {},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        # As Gemma 3 is published from 4B on.
        (
            "gemma3_text",
            {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            {},
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        # Its config in transformers 4 takes exactly these three entries, and the length beside them.
        (
            "phi3",
            {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, **LONG},
            {"original_max_position_embeddings": 1024},
            {
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
                "original_max_position_embeddings": 1024,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]},
            },
        ),
        # Of other families it is read beside the factors, too.
        (
            "llama",
            {"rope_type": "longrope", "rope_theta": 1e4, **LONG},
            {"head_dim": 4},
            {
                "rope_theta": 1e4,
                "original_max_position_embeddings": 1024,
                "rope_scaling": {"rope_type": "longrope", **LONG},
            },
        ),
        (
            "gpt_neox",
            {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5},
            {},
            {"rotary_emb_base": 5e5, "rotary_pct": 0.5, "rope_scaling": None},
        ),
        (
            "olmo2",
            {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 2.0},
            {},
            {"rope_theta": 5e5, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        ),
        (
            "modernbert-decoder",
            {
                "full_attention": {"rope_type": "default", "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            },
            {},
            {"global_rope_theta": 5e5, "local_rope_theta": 2e4, "rope_scaling": None},
        ),
        # No reader older than rope_parameters knows such layers.
        (
            "gemma4_text",
            {
                "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            {},
            {},
        ),
        (
            "gemma3_text",
            {name: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0} for name in LAYERS},
            {},
            {},
        ),
    ],
)
def test_old_names_by_hand(
    family: str, rope: dict[str, Any], settings: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    fields = written(config_of(family, rope, **settings), tmp_path)
    assert {name: fields[name] for name in OLD_NAMES if name in fields} == expected


@pytest.mark.parametrize("kind", SCALINGS)
def test_they_do_not_take_the_place_of_the_new_ones(kind: str, tmp_path: Path) -> None:
    """Loaded and saved, the file is the same; a dense config made of it has the numbers once."""
    config = config_of("llama", {"rope_type": kind, "rope_theta": 5e5, **SCALINGS[kind]}, head_dim=4)
    first = written(config, tmp_path / "first")
    again = AutoConfig.from_pretrained(tmp_path / "first")
    assert again.rope_parameters == config.rope_parameters
    assert written(again, tmp_path / "again") == first
    dense = dense_config(again)
    assert dense.rope_parameters == config.rope_parameters
    assert "rope_scaling" not in dense.to_dict()
