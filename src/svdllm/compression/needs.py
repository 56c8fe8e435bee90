"""Predicts the memory, disk and time of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from svdllm.checkpoint.tensors import compressed_tensors
from svdllm.compression.estimate import Needs
from svdllm.compression.recipe import Recipe
from svdllm.compression.subject import Subject


@dataclass(frozen=True, kw_only=True)
class RunNeeds:
    """What a run needs: bytes of memory and disk, seconds by stage, and where it computes."""

    device: str
    compute_dtype: str
    ram_by_stage: dict[str, int]
    hidden_states_bytes: int
    hidden_states_on_disk: bool
    device_bytes: int
    disk_bytes: int
    seconds_by_stage: dict[str, float]

    @property
    def peak_ram_bytes(self) -> int:
        return max(self.ram_by_stage.values())

    @property
    def seconds(self) -> float:
        return sum(self.seconds_by_stage.values())


def needs_of(
    subject: Subject,
    recipe: Recipe,
    ranks: Mapping[str, int],
    *,
    ranks_known: bool,
    elastic_bytes: int,
    num_outputs: int,
    hidden_states_limit: int | None,
) -> RunNeeds:
    """What a run of the recipe needs for ``num_outputs`` checkpoints of about these ranks."""
    source, stored = subject.source, subject.stored
    device, dtype = subject.placement(recipe)
    gguf_bytes = 0 if source.gguf is None else source.gguf.stat().st_size
    written = compressed_tensors(stored, subject.structure.targets, ranks)
    if recipe.target_speedup is not None and not ranks_known:
        written = stored  # the one limit that is known then: the model is not larger than the dense one
    needs = Needs(
        subject.structure, subject.skeleton, recipe, stored, written, device, dtype, gguf_bytes, hidden_states_limit
    )
    return RunNeeds(
        device=str(device),
        compute_dtype=str(dtype).removeprefix("torch."),
        ram_by_stage=needs.ram_by_stage(),
        hidden_states_bytes=needs.hidden_states,
        hidden_states_on_disk=needs.hidden_states_on_disk,
        device_bytes=needs.device_bytes(),
        disk_bytes=needs.disk_bytes(num_outputs) + elastic_bytes,
        seconds_by_stage=needs.seconds_by_stage(num_outputs),
    )
