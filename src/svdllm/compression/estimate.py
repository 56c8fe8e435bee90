"""Memory, disk and time that a run will take, from shapes alone."""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedModel

from svdllm.checkpoint.tensors import SHARD_BYTES, Tensors, file_bytes, shard_names, tensor_bytes
from svdllm.common.memory import available_bytes, resident_bytes
from svdllm.compression.math.metrics import METHODS
from svdllm.compression.math.statistics import Gram
from svdllm.compression.probe import WINDOW as PROBE_WINDOW
from svdllm.compression.probe import probe_ranks, probe_tokens
from svdllm.compression.ranks.linear_times import SECONDS, work_bytes
from svdllm.compression.recipe import Recipe
from svdllm.models.linears import linear_shape, linears_of
from svdllm.models.structure import Structure, Target

# Share of the free memory that hidden states may take before they go to disk.
HIDDEN_STATES_SHARE = 0.5
# Tokenizer, data set reader, thread stacks and the allocator's slack, beyond what the modules import.
WORKING_BYTES = 120 * 2**20


class Needs:
    """Memory (bytes), disk (bytes) and time (seconds) of a run, from its shapes."""

    def __init__(
        self,
        structure: Structure,
        skeleton: PreTrainedModel,
        recipe: Recipe,
        stored: Tensors,
        written: Tensors,
        device: torch.device,
        dtype: torch.dtype,
        gguf_bytes: int,
        hidden_states_limit: int | None,
    ):
        self.structure, self.recipe, self.device, self.dtype = structure, recipe, device, dtype
        self.method = METHODS[recipe.method]
        self.stored, self.written, self.gguf_bytes = stored, written, gguf_bytes
        inside = tuple(f"{block}." for block in structure.blocks)
        numel = {name: torch.Size(shape).numel() for name, (shape, _) in stored.items()}
        self.linear_shapes = {linear_shape(module) for _, module in linears_of(skeleton)}
        self.outside = sum(size for name, size in numel.items() if not name.startswith(inside)) * dtype.itemsize
        self.block = max(
            sum(size for name, size in numel.items() if name.startswith(prefix)) * dtype.itemsize for prefix in inside
        )
        self.largest_tensor = max(tensor_bytes(stored, [name]) for name in stored)
        self.tokens = recipe.samples * recipe.seqlen
        self.hidden_size = int(skeleton.get_input_embeddings().weight.shape[-1])  # type: ignore[union-attr, index]
        self.runs_tokens = self.method.needs_tokens
        self.vocab_size = int(skeleton.get_input_embeddings().weight.shape[0])  # type: ignore[union-attr, index]
        self.gradients, self.sequential = recipe.needs_gradients, recipe.calibration_mode == "sequential"
        self.gradient_tokens = min(recipe.gradient_samples, recipe.samples) * recipe.seqlen if self.gradients else 0
        self.sequential_tokens = min(recipe.sequential_samples, recipe.samples) * recipe.seqlen * self.sequential
        carried = max(self.tokens, 2 * self.sequential_tokens) if self.runs_tokens else 0
        self.stream_size = self.hidden_size + structure.shared_features  # of one token, between two blocks
        self.hidden_states = carried * self.stream_size * dtype.itemsize
        self.probes = {name: len(ranks) for name, ranks in probe_ranks(recipe, structure).items()}
        self.probe_tokens = probe_tokens(recipe, structure, skeleton) if recipe.needs_probes else 0
        self.hidden_states_on_disk = spill_hidden_states(self.hidden_states, hidden_states_limit)

    def ram_by_stage(self) -> dict[str, int]:
        base = resident_bytes() + WORKING_BYTES
        on_cpu = self.device.type == "cpu"
        hidden = 0 if self.hidden_states_on_disk else self.hidden_states
        stages = {"now": resident_bytes(), "read": base + 2 * self.largest_tensor}
        if self.gguf_bytes:
            floats = sum(torch.Size(shape).numel() for shape, _ in self.stored.values()) * 4
            stages["dequantise"] = base + floats + self.gguf_bytes + self.largest_tensor
        if on_cpu:
            stages["analyze"] = base + hidden + max(self.outside + self._batch(), self._block_needs())
        else:
            stages["analyze"] = base + hidden + 2 * self.largest_tensor
        if self.gradients:
            stages["gradients"] = base + (
                hidden + max(self._head(self.recipe.seqlen), self._reverse_needs()) if on_cpu else hidden
            )
        if self.probe_tokens:
            stages["probe"] = base + self._streams() + (max(self._head(PROBE_WINDOW), self.block) if on_cpu else 0)
        if self.recipe.target_speedup is not None:
            stages["time linears"] = base + (self._timing() if on_cpu else 0)
        if self.sequential:
            stages["sequential"] = base + hidden + (self._sequential_needs() if on_cpu else 0)
        shard = max(tensor_bytes(self.written, names) for names in shard_names(self.written, SHARD_BYTES))
        stages["write"] = base + shard + self._decomposition()
        stages["check"] = base + (self.outside + self.block if on_cpu else self.largest_tensor)
        return stages

    def device_bytes(self) -> int:
        if self.device.type == "cpu":
            return 0
        needs = [self.outside + self._batch(), self._block_needs()]
        if self.gradients:
            needs += [self._head(self.recipe.seqlen), self._reverse_needs()]
        if self.probe_tokens:
            needs.append(self._head(PROBE_WINDOW))
        if self.recipe.target_speedup is not None:
            needs.append(self._timing())
        if self.sequential:
            needs.append(self._sequential_needs())
        return max(needs)

    def disk_bytes(self, num_outputs: int) -> int:
        targets = self.structure.targets
        sides = 2 if self.gradients else 1
        bases = sum(8 * t.full_rank + 4 * sides * t.out_features * t.break_even_rank for t in targets)
        if self.gradients:  # metrics and inputs that wait for the reverse walk, metrics for a sequential calibration
            bases += sum(4 * width**2 for width in {t.group: t.in_features for t in targets}.values())
            bases += self.gradient_tokens * self.hidden_size * self.dtype.itemsize * len(self.structure.blocks)
            bases += self.sequential * sum(4 * t.out_features**2 for t in targets)
        if self.sequential:
            bases += num_outputs * sum(4 * t.factor_params(t.break_even_rank) for t in targets)
        dequantised = tensor_bytes(self.stored) if self.gguf_bytes else 0
        spilled = self.hidden_states if self.hidden_states_on_disk else 0
        return bases + dequantised + spilled + num_outputs * file_bytes(self.written)

    def seconds_by_stage(self, num_outputs: int) -> dict[str, float]:
        rate, rate64 = _multiply_rate(self.device, self.dtype), _multiply_rate(self.device, torch.float64)
        weights = self.structure.num_target_params
        groups = {target.group: target.in_features for target in self.structure.targets}
        forward = 2 * weights * self.tokens / rate if self.runs_tokens else 0.0
        grams = 0.0
        if self.method.statistic is Gram:
            grams = (
                sum(size**2 for size in groups.values())
                * 2
                * 0.65
                * self.tokens
                / _multiply_rate(self.device, torch.float32)
            )
        head = self.outside // self.dtype.itemsize
        backward = 0.0
        if self.gradients:
            lefts = sum(t.out_features**2 for t in self.structure.targets)
            backward = self.gradient_tokens * (4 * weights + 1.3 * lefts + 4 * head) / rate
        depth = len(self.structure.blocks)
        probing = sum(
            self.probes[t.name] * (2 * weights * (depth - t.block) / depth + 2 * head) for t in self.structure.targets
        )
        # eigh takes about as long as 18 n^3 operations of a product (48 ms at n = 576 where products make 70 GFLOP/s).
        eigh = sum(18 * t.full_rank**3 + 4 * t.full_rank * t.num_weights for t in self.structure.targets)
        return {
            "time linears": 0.0 if self.recipe.target_speedup is None else SECONDS * len(self.linear_shapes),
            "forward": 1.25 * forward,  # attention and element-wise work beside the products
            "grams": grams,
            "gradients": 1.25 * backward,
            "probe": 1.5 * self.probe_tokens * probing / rate,
            "sequential": num_outputs * self._sequential_seconds(forward, grams, eigh / rate64),
            "decompose": eigh / rate64,
            "write": num_outputs
            * (
                2 * weights * max(t.break_even_rank for t in self.structure.targets) / rate64
                + file_bytes(self.written) / 4e8
            ),
        }

    def _sequential_seconds(self, forward: float, grams: float, decompositions: float) -> float:
        """Six partial or whole passes, three products per group and a decomposition for each candidate of beta."""
        share = self.sequential_tokens / max(self.tokens, 1)
        return self.sequential * (share * (6 * forward + 4 * grams) + 4 * decompositions)

    def _batch(self) -> int:
        """Activations of one batch at its widest moment."""
        if not self.runs_tokens:
            return 0
        tokens = min(self.tokens, max(self.recipe.batch_tokens, self.recipe.seqlen))
        return tokens * self.dtype.itemsize * (sum(self._widest_inputs()) + 4 * self.hidden_size)

    def _head(self, tokens: int) -> int:
        """One window's logits, their probabilities and gradients, beside everything outside the blocks."""
        return self.outside + 5 * tokens * self.vocab_size * 4

    def _reverse_needs(self) -> int:
        """A block with a batch's activations and their gradients, or a decomposition, beside the outputs' Grams."""
        lefts: dict[int, int] = {}
        for target in self.structure.targets:
            lefts[target.block] = lefts.get(target.block, 0) + 12 * target.out_features**2
        work = max(3 * self._batch(), self._decomposition() + 2 * self._bases())
        inputs = self.gradient_tokens * self.hidden_size * self.dtype.itemsize
        return self.block + inputs + max(lefts.values()) + work

    def _timing(self) -> int:
        return work_bytes(self.linear_shapes, self.recipe.speedup_tokens, self.dtype)

    def _streams(self) -> int:
        """Hidden states of every probe."""
        return (sum(self.probes.values()) + 1) * self.probe_tokens * self.stream_size * self.dtype.itemsize

    def _sequential_needs(self) -> int:
        widest = max(target.in_features for target in self.structure.targets)
        products = 8 * 10 * widest**2  # three sums of two parts, and what is made of them
        return 2 * self.block + products + max(2 * self._batch(), self._decomposition())

    def _widest_inputs(self) -> list[int]:
        """Features of the distinct inputs of the block that has most."""
        blocks: dict[int, dict[str, int]] = {}
        for target in self.structure.targets:
            blocks.setdefault(target.block, {})[target.group] = target.in_features
        return max((list(inputs.values()) for inputs in blocks.values()), key=sum)

    def _statistics(self) -> int:
        power = 2 if self.method.statistic is Gram else 1
        return sum(8 * size**power for size in self._widest_inputs())

    def _decomposition(self) -> int:
        def workspace(target: Target) -> int:
            metric = 2 * target.in_features**2 if self.method.statistic is Gram else 0
            return 8 * (2 * target.num_weights + 4 * target.full_rank**2 + metric)

        return max(workspace(target) for target in self.structure.targets)

    def _bases(self) -> int:
        sizes = [0] * len(self.structure.blocks)
        for target in self.structure.targets:
            sizes[target.block] += 4 * target.out_features * target.break_even_rank
        return max(sizes)

    def _block_needs(self) -> int:
        return self.block + self._statistics() + max(self._batch(), self._decomposition() + self._bases())


def spill_hidden_states(num_bytes: int, limit: int | None) -> bool:
    """Whether hidden states go to disk: above ``limit``, by default half of the memory that is free."""
    if limit is None:
        free = available_bytes()
        limit = None if free is None else int(free * HIDDEN_STATES_SHARE)
    return limit is not None and num_bytes > limit


_rates: dict[tuple[str, torch.dtype], float] = {}


def _multiply_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a product of middling size, measured once."""
    key = (str(device), dtype)
    if key not in _rates:
        size = 512 if device.type == "cpu" else 4096  # a small product only measures how long a kernel takes to start
        left = torch.ones(size, size, device=device, dtype=dtype)
        times = []
        for _ in range(4):
            started = time.perf_counter()
            product = left @ left
            product[0, 0].item()
            times.append(time.perf_counter() - started)
        _rates[key] = 2 * size**3 / min(times)
    return _rates[key]
