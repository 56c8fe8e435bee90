"""The table of recovery methods: one line for each, in the order in which help and messages name them."""

from __future__ import annotations

from svdllm.recovery.blockwise import Blockwise
from svdllm.recovery.distill import Distill
from svdllm.recovery.method import Method
from svdllm.recovery.sequential_lora import SequentialLora

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        SequentialLora(),
        Blockwise(),
        Distill(),
    )
}
