"""A model without data takes no memory, and has the buffers that its constructor computes."""

from __future__ import annotations

import torch
from torch import nn

from families import tiny_config, tiny_model
from svdllm.common.memory import resident_bytes
from svdllm.models.skeleton import build_skeleton


def test_experts_that_the_constructor_fills_take_no_memory():
    config = tiny_config("mixtral", num_local_experts=64, hidden_size=1024, intermediate_size=4096)
    build_skeleton(tiny_config("mixtral"))
    before = resident_bytes()
    skeleton = build_skeleton(config)
    assert resident_bytes() - before < 2**28
    assert skeleton.num_parameters() > 2**30
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_a_large_table_is_computed_all_the_same(monkeypatch):
    config = tiny_config("llama")
    cls = type(tiny_model("llama"))
    made = cls.__init__

    def with_table(self: nn.Module, config: object) -> None:
        made(self, config)
        self.register_buffer("table", torch.ones(4097, 4097).tril(), persistent=False)

    monkeypatch.setattr(cls, "__init__", with_table)
    table = build_skeleton(config).table
    assert not table.is_meta
    assert (table[0, 1], table[1, 0]) == (0, 1)
