"""Predicts the memory of a run, stage by stage: on the CPU, and on the device where that is another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from svdllm.checkpoint.tensors import SHARD_BYTES
from svdllm.common.memory import resident_bytes
from svdllm.compression.forms import bits_in
from svdllm.compression.math.symmetric import ROWS
from svdllm.compression.probe import WINDOW as PROBE_WINDOW
from svdllm.compression.ranks.measure_linears import work_bytes
from svdllm.compression.rounded_targets import BYTES_OF_A_WEIGHT, WEIGHTS_AT_ONCE
from svdllm.compression.workload import Workload
from svdllm.models.structure import Target

# Tokenizer, data set reader, thread stacks and the allocator's slack, beyond what the modules import.
WORKING_BYTES = 120 * 2**20
# Of a GPU, beyond what is counted: workspaces of its libraries and rounding of its allocator (110 to 150 MB on an
# H200), and what its driver takes of the RAM (150 to 180 MB).
GPU_WORKING_BYTES = GPU_RAM_BYTES = 256 * 2**20

# Of a process that shares the run: connections to the others, and memory that the pieces of their sums leave in pieces
# (120 MB beside a model of 135M parameters).
CONNECTED_BYTES = 128 * 2**20

DEQUANTIZING_BYTES = 24  # per weight: codes, zero points, scales and products in 32 bits, and slack


def ram_by_stage(work: Workload, hidden_states_on_disk: bool) -> dict[str, int]:
    """Peak bytes of RAM of every stage that the run has; ``now`` is what the process has already."""
    base = resident_bytes() + WORKING_BYTES + (0 if work.on_cpu else GPU_RAM_BYTES) + _dequantizing(work)
    base += CONNECTED_BYTES if work.processes > 1 else 0
    hidden = 0 if hidden_states_on_disk else work.hidden_states_bytes
    probes = 3 * work.probe_tokens * work.token_bytes if hidden_states_on_disk else work.probe_streams_bytes
    shard = max(min(SHARD_BYTES, work.written_bytes), work.largest_tensor_bytes)
    stages = {"now": resident_bytes(), "read": base + 2 * work.largest_tensor_bytes}
    if work.gguf_bytes:
        stages["dequantise"] = base + 4 * work.num_stored_weights + work.gguf_bytes + work.largest_tensor_bytes
    carried = {"analyze": hidden, "gradients": hidden, "probe": probes, "sequential": hidden}
    for stage, computed in _computed_bytes(work).items():
        on_cpu = computed if work.on_cpu else 2 * work.largest_tensor_bytes if stage == "analyze" else 0
        stages[stage] = base + carried.get(stage, 0) + on_cpu
    narrowed = max(4 * work.narrowed_width(target) ** 2 for target, _ in work.kinds)
    stages["write"] = base + shard + _decomposition(work) + narrowed
    stages["check"] = base + (work.outside_bytes + work.block_bytes if work.on_cpu else work.largest_tensor_bytes)
    return stages


def _dequantizing(work: Workload) -> int:
    """What dequantising the largest weight of a quantised source takes beside it."""
    if work.subject.source.quantization is None:
        return 0
    return DEQUANTIZING_BYTES * max(target.num_weights for target in work.structure.targets)


def device_bytes(work: Workload) -> int:
    """Peak bytes on a device that is not the CPU; 0 on the CPU."""
    return 0 if work.on_cpu else GPU_WORKING_BYTES + max(_computed_bytes(work).values())


def _computed_bytes(work: Workload) -> dict[str, int]:
    """Bytes of the stages that compute, where they compute."""
    recipe = work.recipe
    stages = {"analyze": max(work.outside_bytes + _batch(work), _forward_block(work))}
    if recipe.needs_gradients:
        stages["gradients"] = max(_head(work, recipe.seqlen), _backward_block(work))
    if work.probe_tokens:
        stages["probe"] = max(_head(work, PROBE_WINDOW), work.block_bytes)
    if recipe.target_speedup is not None:
        stages["time linears"] = work_bytes(
            work.structure.targets, work.linear_shapes, recipe.speedup_tokens, work.dtype
        )
    if work.sequential_tokens:
        stages["sequential"] = _sequential_block(work)
    return stages


def _batch(work: Workload) -> int:
    """Activations of one batch at its widest moment."""
    widest = 0.0
    for targets in work.distinct_blocks:
        leaders = {target.group: target for target in targets}.values()
        widest = max(widest, sum(leader.in_features * work.token_shares[leader.pool] for leader in leaders))
    return work.batch_tokens * work.dtype.itemsize * (round(widest) + 4 * work.hidden_size)


def _head(work: Workload, tokens: int) -> int:
    """One window's logits, their probabilities and gradients, beside everything outside the blocks."""
    return work.outside_bytes + 5 * tokens * work.vocab_size * 4


def _forward_block(work: Workload) -> int:
    """A block with its statistics, of two shards with a batch's activations, or of all with what is made of them.

    Those are metrics in float32 that wait for the reverse walk, one after the other, or decompositions.
    """
    power = 2 if work.takes_grams else 1
    statistics = _largest_part(work, lambda target: 8 * target.in_features**power)
    if work.recipe.needs_gradients:
        made = statistics // 2 + 8 * max(width**power for width in work.group_widths.values())
    else:
        made = _decomposition(work) + _bases(work)
    return work.block_bytes + max(statistics + _batch(work), statistics // 2 + made)


def _backward_block(work: Workload) -> int:
    """A block with the sums over its gradients, and a batch's activations and their gradients or a decomposition.

    A left metric is in memory until its target is decomposed, and the bases from then on until all are written.
    """
    gradients = round(work.share * work.gradient_tokens) * work.hidden_size * work.dtype.itemsize

    def part(targets: Sequence[Target]) -> int:
        lefts = [8 * work.left_values(target) for target in targets]
        stages = [sum(lefts) + 3 * _batch(work), sum(lefts) + max(lefts), sum(lefts) * 3 // 2]  # shrunk, then written
        kept = sum(lefts)
        for target, left in zip(targets, lefts, strict=True):
            kept += _bases_of(work, [target])
            stages.append(kept + _decomposition_of(work, [target]))
            kept -= left
        return max(stages)

    return work.block_bytes + gradients + max(map(part, work.parts))


def _sequential_block(work: Workload) -> int:
    """A block as it is and compressed, with sums of products of its inputs in both, or a fit and its decomposition.

    Of the experts of a part, there are the sums of all.
    """
    experts = _largest_part(work, lambda target: 24 * target.in_features**2 if target.pool else 0)
    groups: dict[tuple[int, str], list[Target]] = {}
    for number, targets in enumerate(work.distinct_blocks):
        for target in targets:
            groups.setdefault((number, target.group), []).append(target)

    def largest(group: list[Target]) -> int:
        """Without what the group itself is replaced by, which is made from these."""
        own = 0 if group[0].pool else work.dtype.itemsize * sum(target.num_weights for target in group)
        return max(_sums(group) + 2 * _batch(work), _fit(work, group)) - own

    return 2 * work.block_bytes + experts + max(map(largest, groups.values()))


def _sums(group: Sequence[Target]) -> int:
    """The sums over the inputs that a group of targets reads in the two streams, of two shards."""
    first = group[0]
    if len(group) > 1:
        return 24 * first.in_features**2
    differences = 0 if first.out_features < first.in_features else 16 * first.in_features**2
    return 8 * first.in_features**2 + differences + 16 * first.num_weights


def _fit(work: Workload, group: Sequence[Target]) -> int:
    """The products of a group and a copy, one factor of their size, four matrices of a weight's; or a decomposition.

    A linear that alone reads its inputs is fitted in the memory of its products: nothing of their size is beside them,
    two or three matrices of a weight's, and the decomposition follows when they are gone.
    """
    square, weight = group[0].in_features ** 2, 8 * max(target.num_weights for target in group)
    alone = len(group) == 1 and group[0].out_features < group[0].in_features
    decomposed = _decomposition_of(work, group, fitted=True)
    if alone and work.recipe.shrinkage > 0 and not bits_in(work.recipe.analysed_forms):
        slices = 16 * ROWS * group[0].in_features
        return max(8 * square + 2 * weight + slices, 3 * weight, weight + decomposed)
    products = 8 if alone else 16
    copies = products if len(group) > 1 else 0
    return copies * square + 4 * weight + max((products + 8) * square, products * square + decomposed)


def _decomposition(work: Workload) -> int:
    """The largest decomposition."""
    return _decomposition_of(work, [target for target, _ in work.kinds])


def _decomposition_of(work: Workload, targets: Sequence[Target], *, fitted: bool = False) -> int:
    """The largest decomposition of some targets: a weight, its metric, and squares of its smaller side, in float64.

    That of a fitted weight narrows nothing; its metric is counted with the fit.
    """
    num_bits = len(bits_in(work.recipe.analysed_forms))

    def workspace(target: Target) -> int:
        narrowing = 0 if fitted else work.narrowed_width(target) ** 2 + 2 * ROWS * work.narrowed_width(target)
        at_once = max(target.num_weights, min(WEIGHTS_AT_ONCE, num_bits * target.num_weights))
        rounding = BYTES_OF_A_WEIGHT * at_once if num_bits else 0
        in_float64 = 2 * target.num_weights
        if work.is_pulled_back(target):  # some rows, and a factor that takes the place of the weight
            in_float64 = min(in_float64, 2 * ROWS * target.in_features) + target.in_features**2
        squares = 8 * max(4 * target.full_rank**2, narrowing)
        return 8 * in_float64 + (squares if fitted else _with_metric(work, target, squares)) + rounding

    return max(map(workspace, targets))


def _with_metric(work: Workload, target: Target, squares: int) -> int:
    """The right metric and the matrices that are made beside it.

    It is made in float64, or read in float32, where a copy is in memory for a moment; rounding makes two of it.
    """
    if not work.takes_grams:
        return squares
    square = target.in_features**2
    rounded = 16 * square if bits_in(work.recipe.analysed_forms) else 0
    metric = 4 * square if work.recipe.needs_gradients else 8 * square
    if work.recipe.needs_gradients and work.narrowed_width(target):
        metric = 0  # it is the Gram of the narrowing, counted with the bases
    return metric + max(squares, rounded, 4 * square)


def _bases(work: Workload) -> int:
    """The bases of the targets of the part that has most."""
    return max(_bases_of(work, part) for part in work.parts)


def _bases_of(work: Workload, targets: Sequence[Target]) -> int:
    """The bases of a part's targets, as they are kept until they are written."""

    def basis(target: Target) -> int:
        return 4 * work.basis_width(target) * work.depth(target) + 4 * work.narrowed_width(target) ** 2

    return sum(map(basis, targets))


def _largest_part(work: Workload, size: Callable[[Target], int]) -> int:
    """The largest sum of a size over the first of each group in a part."""

    def total(part: Sequence[Target]) -> int:
        return sum(map(size, {target.group: target for target in part}.values()))

    return max(map(total, work.parts))
