"""One check of memory for every command."""

from __future__ import annotations

import pytest
import torch

from svdllm.common.errors import ResourceError
from svdllm.common.memory import require_memory

CPU = torch.device("cpu")


def test_what_is_needed_and_what_is_free_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdllm.common.memory.available_bytes", lambda: 2 * 10**9)
    require_memory(2 * 10**9, "The weights need", CPU)
    with pytest.raises(ResourceError) as caught:
        require_memory(2 * 10**9 + 1, "The weights need", CPU, "Free some.")
    assert str(caught.value) == "The weights need 2.00 GB of memory, 2.00 GB are free on cpu. Free some."
    assert caught.value.advice == "Free some."


def test_where_free_memory_is_not_known_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdllm.common.memory.available_bytes", lambda: None)
    require_memory(10**15, "The weights need", CPU)
