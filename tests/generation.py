"""Generating with a cache, and comparing what two caches give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from families import tiny_tokens
from svdllm.inference.cache_names import cache_name

WAYS = {
    "padded": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "static beams": {"cache_implementation": "static", "num_beams": 2},
}


@torch.no_grad()
def in_parts(model: Any, ids: Tensor, lengths: list[int], cache: Any = None) -> Tensor:
    """Logits of all ``ids``, of which ``lengths`` are given at a time."""
    cache, logits = DynamicCache(config=model.config) if cache is None else cache, []
    for part in ids.split(lengths, dim=1):
        logits.append(model(input_ids=part, **{cache_name(model): cache}).logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def generated(model: Any, **settings: Any) -> Any:
    """Tokens and scores of a greedy generation after two prompts, of which the first is padded on the left."""
    ids = tiny_tokens(2, 9)
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None} | settings
    return model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **settings)


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
