"""Predicts the seconds of every stage of a run, from its shapes and the speed of the machine."""

from __future__ import annotations

from collections import Counter

from svdllm.common.processes import shared_out
from svdllm.compression.decompose import cost
from svdllm.compression.forms import bits_in
from svdllm.compression.machine_speed import MachineSpeed, busy_share, measure_speed
from svdllm.compression.ranks.measure_linears import NUM_SIZES, ROUNDS
from svdllm.compression.ranks.measure_linears import SECONDS as SECONDS_PER_SHAPE
from svdllm.compression.ranks.question import probed_unit
from svdllm.compression.workload import Workload
from svdllm.models.structure import Target

# Bytes per second of reading weights and looking for NaN, and of writing a checkpoint, hashing it and reading it back.
READ_BYTES, WRITE_BYTES = 4e8, 1e8
FAST_FILES = 3.0  # times as fast at best: with a fast disk and a processor that hashes in hardware
# Bytes per second of the weights of experts that are on disk while their block is loaded.
SCRATCH_BYTES = 1e9
# Of a GGUF file, whose reader is Python: seconds for each token of its vocabulary, which is parsed four times, and for
# the name of each tensor, which is looked for in every block; weights dequantised, written and hashed per second.
GGUF_TOKEN, GGUF_NAME, GGUF_WEIGHTS = 4e-4, 7e-4, 3e7
# Element-wise operations for every output of a linear: norms, residuals, rotations, gates, copies.
PASSES = 16
# Duration of a backward pass, with the forward pass that it repeats, in forward passes.
BACKWARD = 2.5
# A call of few tokens takes as long as with this many more, in which time the weights are read from memory.
CALL_TOKENS = 32
# Share of a product's work that a symmetric product needs, computed panel by panel.
SYMMETRIC = 0.65
# Operations of an MLP's narrowing, in cubes of its width: an inverse, its downdates, and a Cholesky factor.
NARROWING = 5
# Time of a compressed linear, the mean over the sizes of all forms, as a share of its time dense.
SHARE_OF_DENSE = 0.6
# Element-wise passes over a weight that search the scales of its groups.
SCALE_PASSES = 150
MARGIN = 1.25  # of the longest time, for what shapes do not show


def predicted_seconds(work: Workload) -> tuple[dict[str, float], tuple[float, float]]:
    """Predicts the seconds of every stage, at the median speed measured, and the least and most seconds of all stages.

    The least belongs to the best speed measured. The most belongs to the median speed, or to the share of the machine
    that other processes leave, whichever is slower, and has a margin.
    """
    shapes: Counter[tuple[int, int]] = Counter()
    for target, count in work.kinds:
        shapes[target.out_features, target.in_features] += count
    best, typical = measure_speed(work.device, work.dtype, *shapes.most_common(1)[0][0])
    stages = _seconds_by_stage(work, typical)
    least = sum(_seconds_by_stage(work, best, files=FAST_FILES).values())
    busy = busy_share() if work.on_cpu else 1.0
    return stages, (least, MARGIN * max(sum(stages.values()), least * busy))


def _seconds_by_stage(work: Workload, speed: MachineSpeed, files: float = 1.0) -> dict[str, float]:
    """``files`` is how many times as fast as assumed files are read, converted and written."""
    spectra = _largest_load(work) * (_spectra_seconds(work, speed) + _rounding_seconds(work, speed))
    walk = work.share * (_forward_seconds(work, work.tokens, speed) + _gram_seconds(work, work.tokens, speed))
    stages = {
        "open": _gguf_seconds(work) / files if work.gguf_bytes else 0.0,
        "check weights": work.stored_bytes / READ_BYTES / files,
        "time linears": _timing_seconds(work, speed),
        "analyze": walk if work.gradient_tokens else walk + spectra,
        "gradients": work.share * _backward_seconds(work, speed) + spectra if work.gradient_tokens else 0.0,
        "probe": _probe_seconds(work, speed) / work.processes,
        "sequential": work.num_outputs * _sequential_seconds(work, speed),
        "write": work.num_outputs * _write_seconds(work, speed, files),
    }
    return {stage: seconds + _experts_seconds(work, stage) for stage, seconds in stages.items()}


def _experts_seconds(work: Workload, stage: str) -> float:
    """Seconds of reading experts that are on disk, for every batch in every run of a stage.

    The forward walk reads all in runs that collect more than experts, in the last run, and once in all others together.
    The reverse walk reads all in every run, forward and back.
    """
    parts = max(work.parts_of_blocks, key=len)
    whole = sum(any(target.pool is None for target in part) for part in parts)
    runs = {
        "analyze": (work.tokens, whole + 2 * (len(parts) > whole)),
        "gradients": (work.gradient_tokens, 2 * len(parts)),
        "probe": (work.probe_tokens, sum(work.num_probes.values()) / 2),
        "sequential": (work.sequential_tokens, 6 * work.num_outputs),
    }
    if not work.experts_on_disk or stage not in runs:
        return 0.0
    tokens, count = runs[stage]
    return count * -(-tokens // max(work.batch_tokens, 1)) * sum(work.experts_bytes) / SCRATCH_BYTES


def _gguf_seconds(work: Workload) -> float:
    names = len(work.stored) * len(work.structure.blocks)
    return GGUF_TOKEN * work.vocab_size + GGUF_NAME * names + work.num_stored_weights / GGUF_WEIGHTS


def _timing_seconds(work: Workload, speed: MachineSpeed) -> float:
    """Seconds of timing the linears: the same for every shape, unless the least number of rounds takes longer."""
    if work.recipe.target_speedup is None:
        return 0.0
    compressed = {(target.out_features, target.in_features) for target, _ in work.kinds}
    in_a_round = SHARE_OF_DENSE * NUM_SIZES * len(work.recipe.used_forms)
    operations = 2 * (ROUNDS.start + 2) * (work.recipe.speedup_tokens + CALL_TOKENS)  # two more before the rounds

    def seconds(rows: int, columns: int) -> float:
        products = 1 + in_a_round if (rows, columns) in compressed else 1
        return max(SECONDS_PER_SHAPE, products * operations * rows * columns / speed.multiply)

    return sum(seconds(*shape) for shape in work.linear_shapes)


def _forward_seconds(work: Workload, tokens: int, speed: MachineSpeed) -> float:
    """Seconds of a forward pass through all blocks: products, attention and element-wise operations."""
    attention = 3 * work.recipe.seqlen * work.hidden_size * len(work.structure.blocks)
    passed = PASSES * sum(count * work.token_shares[t.pool] * t.out_features for t, count in work.kinds)
    return tokens * ((2 * work.weights_per_token + attention) / speed.multiply + passed / speed.elements)


def _gram_seconds(work: Workload, tokens: int, speed: MachineSpeed) -> float:
    if not work.takes_grams:
        return 0.0
    return 2 * SYMMETRIC * tokens * work.gram_values_per_token / speed.multiply32


def _backward_seconds(work: Workload, speed: MachineSpeed) -> float:
    """Seconds of the reverse walk: forward again and back, Grams of output gradients, and the head both ways."""
    tokens, head = work.gradient_tokens, work.vocab_size * work.hidden_size
    lefts = sum(count * work.token_shares[target.pool] * _left_operations(target, work) for target, count in work.kinds)
    return (
        BACKWARD * _forward_seconds(work, tokens, speed)
        + tokens * lefts / speed.multiply32
        + tokens * (4 * head / speed.multiply + 6 * work.vocab_size / speed.elements)
    )


def _left_operations(target: Target, work: Workload) -> float:
    """Operations of the sums over the gradients of a target, for every token."""
    through_weight = 2 * target.num_weights if work.is_pulled_back(target) else 0
    return 2 * SYMMETRIC * work.left_values(target) + through_weight


def _probe_seconds(work: Workload, speed: MachineSpeed) -> float:
    """Seconds of probing: every probe goes from its block to the end, and through the head."""
    depth = len(work.structure.blocks)
    block_of = work.structure.block_of
    blocks = sum(count * (depth - block_of[probed_unit(name)]) / depth for name, count in work.num_probes.items())
    count = sum(work.num_probes.values())
    head = 2 * work.vocab_size * work.hidden_size / speed.multiply + 8 * work.vocab_size / speed.elements
    products = sum(n * work.num_probes[t.unit] * 0.2 * t.break_even_rank * t.num_weights for t, n in work.kinds)
    if not count:
        return 0.0
    return (
        blocks * _forward_seconds(work, work.probe_tokens + CALL_TOKENS, speed)
        + count * work.probe_tokens * head
        + products / speed.multiply
    )


def _spectra_seconds(work: Workload, speed: MachineSpeed) -> float:
    return sum(count * _spectrum_seconds(target, work, speed) for target, count in work.kinds)


def _spectrum_seconds(target: Target, work: Workload, speed: MachineSpeed) -> float:
    """Seconds of one decomposition: products with the metrics, and the eigenvectors of the smaller side."""
    rows, columns, rank = target.out_features, target.in_features, target.full_rank
    operations = 2 * SYMMETRIC * rank * rank * columns
    if work.takes_grams:
        operations += 2 * rank * columns * columns
    if rows > columns:  # a Cholesky factor of W^T G W first
        operations += 2 * SYMMETRIC * columns * columns * rows + columns**3 + 2 * rows * columns * rank
    if work.gradient_tokens and not work.is_pulled_back(target):
        operations += 2 * rows * rows * columns
        operations += rows**3 / 3 + 2 * rows * rank * rank if rows <= columns else 0
    operations += NARROWING * work.narrowed_width(target) ** 3
    return operations / speed.multiply64 + rank**3 / speed.eigh


def _largest_load(work: Workload, *, by_group: bool = False) -> float:
    """The share of the decompositions that the process with most of them does.

    Args:
        by_group: a group, or a pool of experts, has to be done before the next one.
    """
    targets = max(work.distinct_blocks, key=len)
    stages: dict[str, list[float]] = {}
    for target in targets:
        stages.setdefault(target.pool or target.group if by_group else "", []).append(cost(target))
    loads = [
        max(sum(costs[piece] for piece in own) for own in shared_out(costs, work.processes))
        for costs in stages.values()
    ]
    return sum(loads) / sum(map(sum, stages.values()))


def _rounding_seconds(work: Workload, speed: MachineSpeed) -> float:
    """Seconds of rounding every target in every number of bits: the search of scales, and the feedback of errors."""
    num_bits = len(bits_in(work.recipe.analysed_forms))
    if not num_bits:
        return 0.0
    weights = sum(count * target.num_weights for target, count in work.kinds)
    feedback = sum(count * target.num_weights * target.in_features for target, count in work.kinds)
    return num_bits * (SCALE_PASSES * weights / speed.elements + feedback / speed.multiply32)


def _sequential_seconds(work: Workload, speed: MachineSpeed) -> float:
    """Seconds of a sequential calibration: five passes, partial or whole, two products per group, and the fits."""
    if not work.sequential_tokens:
        return 0.0
    tokens = work.sequential_tokens
    solved = sum(n * (t.in_features**3 / 3 + 10 * t.num_weights * t.in_features) for t, n in work.kinds)
    fit = _spectra_seconds(work, speed) + solved / speed.multiply64
    walked = 5 * _forward_seconds(work, tokens, speed) + 3 * _gram_seconds(work, tokens, speed)
    return work.share * walked + _largest_load(work, by_group=True) * fit


def _write_seconds(work: Workload, speed: MachineSpeed, files: float) -> float:
    factors = sum(2 * count * work.depth(target) * target.num_weights for target, count in work.kinds)
    return factors / speed.multiply64 + work.written_bytes / WRITE_BYTES / files
