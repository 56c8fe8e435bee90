"""Latents of packed keys and values in the cache: the logits of the ordinary cache, in the bytes that the ranks say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from families import ATTENTIONS
from generation import WAYS, assert_same, generated, in_parts
from mixed import COLUMNS, DENSE, PAIR, ROWS, mixed_model, model_with
from svdllm import fuse_factors
from svdllm.inference.cache_names import cache_of
from svdllm.inference.latent_cache import cache_bytes, cache_size, use_latent_cache, use_ordinary_cache

# In the order q, k, v, o of most families; OPT's is k, v, q, o.
MIXES: dict[str, Any] = {
    "rows": (ROWS,),
    "columns": (COLUMNS,),
    "keys by rows, values by columns": (COLUMNS, ROWS, COLUMNS, PAIR),
    "q packed, k dense, v pair": (ROWS, DENSE, PAIR, DENSE),
    "turning": (PAIR, ROWS, COLUMNS),
}
FAMILIES = ["llama", "qwen2", "qwen3", "gemma3_text", "opt", "stablelm", *ATTENTIONS]


def random_model(family: str, mix: str, **settings: Any) -> Any:
    return mixed_model(family, forms=MIXES[mix], **settings)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_ordinary_cache(family: str, mix: str, fused: bool) -> None:
    """A prompt, single tokens, few tokens (which work with the latents), many (which rebuild)."""
    ids, lengths = tiny_ids(), [7, 1, 1, 2, 14, 1]
    expected = in_parts(random_model(family, mix), ids, lengths)
    for keys in (True, False):
        model = random_model(family, mix)
        if fused:
            fuse_factors(model)
        use_latent_cache(model, keys=keys)
        assert_same(in_parts(model, ids, lengths), expected)
        use_ordinary_cache(model)
        assert_same(in_parts(model, ids, lengths), expected)


def tiny_ids() -> Tensor:
    return torch.randint(3, 128, (2, 26), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mix", ["rows", "columns"])
@pytest.mark.parametrize("static", [False, True])
def test_bytes(mix: str, static: bool) -> None:
    model = random_model("llama", mix)
    assert use_latent_cache(model) == 2
    cache: Any = StaticCache(config=model.config, max_cache_len=12) if static else DynamicCache()
    assert_same(
        in_parts(model, tiny_ids()[:, :12], [5, 1, 6], cache),
        in_parts(random_model("llama", mix), tiny_ids()[:, :12], [12]),
    )
    rank = {"rows": 7, "columns": 5}[mix]
    assert cache_bytes(cache) == 2 * 12 * 2 * 2 * rank * 4
    assert cache_size(model.config, torch.float32).latent == 2 * 2 * rank * 4


@pytest.mark.parametrize("way", WAYS)
def test_generates_the_same(way: str) -> None:
    ordinary, latent = random_model("llama", "turning"), random_model("llama", "turning")
    use_latent_cache(latent)
    found, expected = generated(latent, **WAYS[way]), generated(ordinary, **WAYS[way])
    assert torch.equal(found.sequences, expected.sequences)
    assert cache_bytes(cache_of(found)) < cache_bytes(cache_of(expected))


@pytest.mark.parametrize("fused", [False, True])
def test_one_latent_for_keys_and_values_packed_by_columns(fused: bool) -> None:
    shared = {f"model.layers.{i}.self_attn.v_proj": f"model.layers.{i}.self_attn.k_proj" for i in (0, 1)}
    forms = {name: COLUMNS for pair in shared.items() for name in pair}
    model, plain = (model_with("llama", forms, shared_factors=shared) for _ in range(2))
    for each in (model, plain):
        for layer in each.model.layers:
            layer.self_attn.v_proj.order.copy_(layer.self_attn.k_proj.order)
    if fused:
        fuse_factors(model)
    assert use_latent_cache(model) == 2
    cache = DynamicCache()
    lengths = [7, 1, 1, 2, 14, 1]
    assert_same(in_parts(model, tiny_ids(), lengths, cache), in_parts(plain, tiny_ids(), lengths))
    assert cache_bytes(cache) == 2 * 26 * 2 * COLUMNS["rank"] * 4
    assert cache_size(model.config, torch.float32).latent == 2 * COLUMNS["rank"] * 4


@pytest.mark.parametrize("fused", [False, True])
def test_loaded_into_and_cast_with_latents(fused: bool) -> None:
    """What is derived from orders and weights is made again."""
    model, other = random_model("llama", "rows"), mixed_model("llama", seed=5, forms=MIXES["rows"])
    if fused:
        fuse_factors(model)
    use_latent_cache(model)
    in_parts(model, tiny_ids(), [20, 6])
    model.load_state_dict(other.state_dict())
    lengths = [7, 1, 1, 2, 14, 1]
    assert_same(in_parts(model, tiny_ids(), lengths), in_parts(other, tiny_ids(), lengths))
    assert_same(in_parts(model.double(), tiny_ids(), lengths).float(), in_parts(other, tiny_ids(), lengths))
