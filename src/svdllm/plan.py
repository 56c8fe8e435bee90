"""The plan: what a run will compress, to which size, and what it needs, from configs and shapes alone."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from svdllm.budget import (
    SHARD_BYTES,
    Tensors,
    choose_ranks,
    compressed_tensors,
    file_bytes,
    num_params,
    shard_names,
    stored_tensors,
    tensor_bytes,
)
from svdllm.config import Recipe
from svdllm.errors import InputError
from svdllm.memory import available_bytes, resident_bytes
from svdllm.methods import METHODS
from svdllm.source import Source, build_skeleton, open_config
from svdllm.statistics import Gram
from svdllm.structure import Structure, Target, discover

# Share of the free memory that hidden states may take before they go to disk.
HIDDEN_STATES_SHARE = 0.5
# Tokenizer, data set reader, thread stacks and the allocator's slack, beyond what the modules import.
WORKING_BYTES = 120 * 2**20


@dataclass(frozen=True, kw_only=True)
class PlannedTarget:
    """One linear of the plan; ``rank`` is None where it stays dense."""

    name: str
    out_features: int
    in_features: int
    rank: int | None
    params: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do. Sizes in bytes, times in seconds."""

    model: str
    model_type: str
    dtype: str
    device: str
    compute_dtype: str
    method: str
    num_blocks: int
    num_groups: int
    targets: list[PlannedTarget]
    ignored: list[str]
    achieved_ratio: float
    params: int
    dense_params: int
    file_bytes: int
    dense_file_bytes: int
    ram_by_stage: dict[str, int]
    hidden_states_bytes: int
    hidden_states_on_disk: bool
    device_bytes: int
    disk_bytes: int
    seconds_by_stage: dict[str, float]
    warnings: list[str] = field(default_factory=list)

    @property
    def peak_ram_bytes(self) -> int:
        return max(self.ram_by_stage.values())

    @property
    def ranks(self) -> dict[str, int]:
        return {target.name: target.rank for target in self.targets if target.rank is not None}

    @property
    def seconds(self) -> float:
        return sum(self.seconds_by_stage.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"peak_ram_bytes": self.peak_ram_bytes, "seconds": self.seconds}


def plan(
    model: str | Path | PreTrainedModel,
    recipe: Recipe,
    *,
    offline: bool = False,
    revision: str | None = None,
    hidden_states_limit: int | None = None,
) -> list[Plan]:
    """Plans a run from configs and file headers; of a hub model, only its config is fetched.

    Returns one plan per ratio of the recipe.

    Raises:
        InputError, UnsupportedModelError: as ``compress`` would, before any work.
    """
    recipe.require_budget()
    source = open_config(model, offline=offline, revision=revision)
    return plans_of(model, source, recipe, hidden_states_limit)


def plans_of(
    model: str | Path | PreTrainedModel, source: Source, recipe: Recipe, hidden_states_limit: int | None
) -> list[Plan]:
    """One plan per ratio, for a model that is open."""
    skeleton, structure = look_at(source, recipe)
    path = None if isinstance(model, PreTrainedModel) else Path(model)
    return [
        make_plan(
            source,
            skeleton,
            structure,
            single,
            num_outputs=len(recipe.single()),
            gguf_bytes=path.stat().st_size if path is not None and path.is_file() else 0,
            hidden_states_limit=hidden_states_limit,
        )
        for single in recipe.single()
    ]


def look_at(source: Source, recipe: Recipe) -> tuple[PreTrainedModel, Structure]:
    """The skeleton of a model and what it is made of.

    Raises:
        InputError: the model is compressed already, or a pattern of the recipe matches nothing.
        UnsupportedModelError: its structure is not understood.
    """
    if getattr(source.config, "svdllm", None):
        raise InputError(f"{source.name} is compressed already; compress its dense source ({source.config.svdllm['source']['id']}).")
    skeleton = build_skeleton(source.config)
    return skeleton, discover(skeleton, recipe.ignore)


def make_plan(
    source: Source,
    skeleton: PreTrainedModel,
    structure: Structure,
    recipe: Recipe,
    *,
    num_outputs: int = 1,
    gguf_bytes: int = 0,
    hidden_states_limit: int | None = None,
) -> Plan:
    """The plan of a single recipe for a model that is looked at already."""
    device = resolve_device(recipe.device)
    dtype = resolve_dtype(recipe.dtype, device, source.dtype)
    stored = stored_tensors(source, skeleton)
    ranks = choose_ranks(recipe, structure, stored)
    written = compressed_tensors(stored, structure.targets, ranks)
    needs = _Needs(structure, skeleton, recipe, stored, written, device, dtype, gguf_bytes, hidden_states_limit)
    dense_linear = structure.num_target_params
    kept = sum(_params(target, ranks) for target in structure.targets)
    return Plan(
        model=source.name,
        model_type=source.config.model_type,
        dtype=str(source.dtype).removeprefix("torch."),
        device=str(device),
        compute_dtype=str(dtype).removeprefix("torch."),
        method=recipe.method,
        num_blocks=len(structure.blocks),
        num_groups=len({target.group for target in structure.targets}),
        targets=[
            PlannedTarget(
                name=target.name,
                out_features=target.out_features,
                in_features=target.in_features,
                rank=ranks.get(target.name),
                params=_params(target, ranks),
            )
            for target in structure.targets
        ],
        ignored=list(structure.ignored),
        achieved_ratio=1 - kept / dense_linear,
        params=num_params(written),
        dense_params=num_params(stored),
        file_bytes=file_bytes(written),
        dense_file_bytes=file_bytes(stored),
        ram_by_stage=needs.ram_by_stage(),
        hidden_states_bytes=needs.hidden_states,
        hidden_states_on_disk=needs.hidden_states_on_disk,
        device_bytes=needs.device_bytes(),
        disk_bytes=needs.disk_bytes(num_outputs),
        seconds_by_stage=needs.seconds_by_stage(num_outputs),
        warnings=calibration_warnings(structure, recipe, recipe.samples * recipe.seqlen),
    )


def calibration_warnings(structure: Structure, recipe: Recipe, num_tokens: int) -> list[str]:
    """What to say about the amount of calibration text."""
    if METHODS[recipe.method].statistic is not Gram:
        return []
    widest = max(structure.targets, key=lambda target: target.in_features)
    if num_tokens >= widest.in_features:
        return []
    return [
        f"Only {num_tokens:,} calibration tokens ({recipe.samples} x {recipe.seqlen}), fewer than the widest input has "
        f"features ({widest.in_features:,}, {widest.name}): its Gram is singular and the result fits these tokens only. "
        f"Use at least {widest.in_features:,} tokens, better ten times as many."
    ]


def resolve_device(name: str) -> torch.device:
    """``auto`` is the first accelerator, else the CPU. Raises InputError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        available = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise InputError(f"--device {name!r} is not available here; there is {', '.join(available)}.") from error
    if device.type == "meta":
        raise InputError("--device 'meta' holds no numbers; use cpu or cuda.")
    return device


def resolve_dtype(name: str, device: torch.device, source_dtype: torch.dtype) -> torch.dtype:
    """``auto`` computes in float32 on a CPU, where half precision is slow, else in the source's dtype."""
    if name != "auto":
        return getattr(torch, name)
    if source_dtype == torch.float64:
        return torch.float64
    return torch.float32 if device.type == "cpu" else source_dtype


def spill_hidden_states(num_bytes: int, limit: int | None) -> bool:
    """Whether hidden states go to disk: above ``limit``, by default half of the memory that is free."""
    if limit is None:
        free = available_bytes()
        limit = None if free is None else int(free * HIDDEN_STATES_SHARE)
    return limit is not None and num_bytes > limit


class _Needs:
    """Memory, disk and time of a run, from its shapes."""

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
        self.outside = sum(size for name, size in numel.items() if not name.startswith(inside)) * dtype.itemsize
        self.block = max(
            sum(size for name, size in numel.items() if name.startswith(prefix)) * dtype.itemsize for prefix in inside
        )
        self.largest_tensor = max(tensor_bytes(stored, [name]) for name in stored)
        self.tokens = recipe.samples * recipe.seqlen
        self.hidden_size = skeleton.get_input_embeddings().weight.shape[-1]  # type: ignore[union-attr, index]
        self.runs_tokens = self.method.statistic is not None
        self.hidden_states = self.tokens * self.hidden_size * dtype.itemsize if self.runs_tokens else 0
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
        shard = max(tensor_bytes(self.written, names) for names in shard_names(self.written, SHARD_BYTES))
        stages["write"] = base + shard + self._decomposition()
        stages["check"] = base + (self.outside + self.block if on_cpu else self.largest_tensor)
        return stages

    def device_bytes(self) -> int:
        if self.device.type == "cpu":
            return 0
        return max(self.outside + self._batch(), self._block_needs())

    def disk_bytes(self, num_outputs: int) -> int:
        bases = sum(8 * t.full_rank + 4 * t.out_features * t.break_even_rank for t in self.structure.targets)
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
            grams = sum(size**2 for size in groups.values()) * 2 * 0.65 * self.tokens / _multiply_rate(self.device, torch.float32)
        # eigh takes about 9 n^3 multiplications, at a fraction of the rate of a product.
        eigh = sum(9 * t.full_rank**3 / 0.25 + 4 * t.full_rank * t.num_weights for t in self.structure.targets)
        return {
            "forward": 1.25 * forward,  # attention and element-wise work beside the products
            "grams": grams,
            "decompose": eigh / rate64,
            "write": num_outputs * (2 * weights * max(t.break_even_rank for t in self.structure.targets) / rate64
                                    + file_bytes(self.written) / 4e8),
        }

    def _batch(self) -> int:
        """Activations of one batch at its widest moment."""
        if not self.runs_tokens:
            return 0
        tokens = min(self.tokens, max(self.recipe.batch_tokens, self.recipe.seqlen))
        widths = sum({t.group: t.in_features for t in self.structure.block_targets(0)}.values())
        return tokens * self.dtype.itemsize * (widths + 4 * self.hidden_size)

    def _statistics(self) -> int:
        groups = {t.group: t.in_features for t in self.structure.block_targets(0)}
        if self.method.statistic is Gram:
            return sum(12 * size**2 for size in groups.values())
        return sum(8 * size for size in groups.values())

    def _decomposition(self) -> int:
        def workspace(target: Target) -> int:
            metric = 2 * target.in_features**2 if self.method.statistic is Gram else 0
            return 8 * (2 * target.num_weights + 4 * target.full_rank**2 + metric)

        return max(workspace(target) for target in self.structure.targets)

    def _bases(self) -> int:
        return sum(4 * t.out_features * t.break_even_rank for t in self.structure.block_targets(0))

    def _block_needs(self) -> int:
        return self.block + self._statistics() + max(self._batch(), self._decomposition() + self._bases())


def _params(target: Target, ranks: dict[str, int]) -> int:
    rank = ranks.get(target.name)
    return target.num_weights if rank is None else target.factor_params(rank)


_rates: dict[tuple[str, torch.dtype], float] = {}


def _multiply_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a product of middling size, measured once."""
    key = (str(device), dtype)
    if key not in _rates:
        left = torch.ones(512, 512, device=device, dtype=dtype)
        times = []
        for _ in range(4):
            started = time.perf_counter()
            product = left @ left
            product[0, 0].item()
            times.append(time.perf_counter() - started)
        _rates[key] = 2 * 512**3 / min(times)
    return _rates[key]
