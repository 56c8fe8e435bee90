"""The table of pruning methods, by name."""

from __future__ import annotations

from svdllm.compression.recipe import Recipe
from svdllm.pruning.block_pruner import BLOCK_PRUNER
from svdllm.pruning.flap import FLAP
from svdllm.pruning.job import Method
from svdllm.pruning.llm_pruner import LLM_PRUNER
from svdllm.pruning.settings import Pruning
from svdllm.pruning.slice_gpt import SLICE_GPT

METHODS: dict[str, Method] = {row.name: row for row in (FLAP, LLM_PRUNER, SLICE_GPT, BLOCK_PRUNER)}


def recipe_of(settings: Pruning) -> Recipe:
    """The recipe of a run on the same text and device; windows are those that the method was published with."""
    method = METHODS[settings.pruning]
    return settings.recipe(method.samples, method.seqlen)
