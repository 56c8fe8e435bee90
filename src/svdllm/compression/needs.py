"""Predicts the memory, disk and time of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from svdllm.common.memory import available_bytes
from svdllm.compression.duration import predicted_seconds
from svdllm.compression.math.statistics import gram_values
from svdllm.compression.memory_needs import device_bytes, ram_by_stage
from svdllm.compression.recipe import Recipe
from svdllm.compression.sizes import Sizes
from svdllm.compression.subject import Subject
from svdllm.compression.workload import Workload
from svdllm.models.batches import SHARDS

# Share of the free memory that hidden states may take before they go to disk.
HIDDEN_STATES_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class RunNeeds:
    """The needs of a run: bytes of memory and disk, seconds by stage, and where it computes."""

    device: str
    compute_dtype: str
    ram_by_stage: dict[str, int]
    hidden_states_bytes: int
    hidden_states_on_disk: bool
    experts_on_disk: bool  # the weights of those of the loaded block
    device_bytes: int
    disk_bytes: int
    processes: int  # each of which needs the memory
    network_bytes: int  # that each process gets from the others
    seconds_by_stage: dict[str, float]
    seconds_range: tuple[float, float]  # of the whole run: on an idle machine, and as busy as this one is

    @property
    def peak_ram_bytes(self) -> int:
        return max(self.ram_by_stage.values())

    @property
    def seconds(self) -> float:
        return sum(self.seconds_by_stage.values())


def needs_of(
    subject: Subject,
    recipe: Recipe,
    sizes: Sizes,
    *,
    forms_known: bool,
    num_outputs: int,
    hidden_states_limit: int | None,
    processes: int = 1,
) -> RunNeeds:
    """Predicts what a run of the recipe needs for ``num_outputs`` checkpoints of about these sizes."""
    device, dtype = subject.placement(recipe)
    limit_known = forms_known or recipe.target_speedup is None  # else: the model is not larger than the dense one
    work = Workload(
        subject=subject,
        recipe=recipe,
        device=device,
        dtype=dtype,
        written_bytes=sizes.file_bytes if limit_known else sizes.dense_file_bytes,
        num_outputs=num_outputs,
        processes=processes,
    )
    most = max(work.hidden_states_bytes, work.probe_streams_bytes)
    on_disk = spill_hidden_states(most, hidden_states_limit, processes)
    if _spill_experts(work, on_disk):
        work = replace(work, experts_on_disk=True)
    seconds, seconds_range = predicted_seconds(work)
    return RunNeeds(
        device=str(device),
        compute_dtype=str(dtype).removeprefix("torch."),
        ram_by_stage=ram_by_stage(work, on_disk),
        hidden_states_bytes=work.hidden_states_bytes,
        hidden_states_on_disk=on_disk,
        experts_on_disk=work.experts_on_disk,
        device_bytes=device_bytes(work),
        disk_bytes=_disk_bytes(work, on_disk) + sizes.elastic_bytes,
        processes=processes,
        network_bytes=_network_bytes(work),
        seconds_by_stage=seconds,
        seconds_range=seconds_range,
    )


def spill_hidden_states(num_bytes: int, limit: int | None, processes: int = 1) -> bool:
    """Whether a process's hidden states go to disk: above ``limit``, by default half of its part of the free memory."""
    if limit is None:
        free = available_bytes()
        limit = None if free is None else int(free * HIDDEN_STATES_SHARE / processes)
    return limit is not None and num_bytes > limit


def _spill_experts(work: Workload, hidden_states_on_disk: bool) -> bool:
    """Whether the experts of the loaded block go to disk: on a CPU whose free memory does not hold the block."""
    free = available_bytes()
    if free is None or not work.on_cpu or not work.structure.pools:
        return False
    stages = ram_by_stage(work, hidden_states_on_disk)
    return max(stages.values()) - stages["now"] > free / work.processes


def _network_bytes(work: Workload) -> int:
    """Bytes that a process gets from the others: their shards of all sums, and what they have fitted."""
    others = work.processes - 1
    widths = work.group_widths.values()
    grams = sum(map(gram_values, widths))
    forward = 8 * grams if work.takes_grams else 0
    backward = fitted = 0
    if work.recipe.needs_gradients:
        backward = 8 * sum(n * sum(map(gram_values, work.left_sums(t))) for t, n in work.kinds)
    if work.sequential_tokens:
        forward += work.num_outputs * 8 * (grams + sum(width**2 for width in widths))
        fitted = work.num_outputs * sum(4 * n * (t.in_features + t.out_features) * work.depth(t) for t, n in work.kinds)
    rounds = -(-min(SHARDS, work.num_batches) // work.processes)
    return round(rounds * others * (forward + backward) + fitted * others / work.processes)


def _disk_bytes(work: Workload, hidden_states_on_disk: bool) -> int:
    """The analysis, what waits for other stages, and the checkpoints."""
    recipe = work.recipe
    is_sequential = work.sequential_tokens > 0
    needed = sum(n * (8 * t.full_rank + 4 * work.basis_width(t) * work.depth(t)) for t, n in work.kinds)
    needed += sum(4 * n * work.narrowed_width(t) ** 2 for t, n in work.kinds)
    if (
        recipe.needs_gradients
    ):  # metrics and inputs that wait for the reverse walk, metrics for a sequential calibration
        needed += sum(4 * width**2 for width in work.group_widths.values())
        needed += work.gradient_tokens * work.hidden_size * work.dtype.itemsize * len(work.structure.blocks)
        needed += is_sequential * sum(4 * n * work.left_values(t) for t, n in work.kinds)
    if is_sequential:
        needed += work.num_outputs * sum(
            4 * n * max(t.num_weights, (t.in_features + t.out_features) * work.depth(t)) for t, n in work.kinds
        )
    if work.gguf_bytes:
        needed += work.stored_bytes
    if hidden_states_on_disk:
        needed += work.processes * max(work.hidden_states_bytes, work.probe_streams_bytes)
    if work.experts_on_disk:  # as they are; truncated, with their factors; or fitted, with theirs
        needed += work.processes * (3 if work.num_probes or is_sequential else 1) * max(work.experts_bytes)
    return needed + work.num_outputs * work.written_bytes
