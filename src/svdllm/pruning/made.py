"""A pruned model before it is written: its tensors, and what its config says about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from svdllm.checkpoint.tensors import Tensors
from svdllm.models.experts import Readable


@dataclass(frozen=True, kw_only=True)
class Made:
    """The tensors of a pruned model, and the entries of its config.

    Args:
        layout: names, shapes and dtypes of the tensors in the files.
        tensors: the tensors by name, on the CPU.
        entry: entries of ``config.svdllm``.
        fields: entries of the config itself that change.
        removed: number of weights by which the model is smaller.
        details: what the report says about the choice.
    """

    layout: Tensors
    tensors: Readable
    entry: dict[str, Any]
    fields: dict[str, Any] = field(default_factory=dict)
    removed: int
    details: dict[str, Any]
