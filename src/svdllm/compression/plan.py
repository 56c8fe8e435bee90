"""The plan: what a run will compress, to which size, and what it needs, from configs and shapes alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from svdllm.checkpoint.quantized import require_dtype
from svdllm.checkpoint.tensors import buffer_names, compressed_tensors, file_bytes, num_params, stored_tensors
from svdllm.common.device import resolve_device, resolve_dtype
from svdllm.common.errors import InputError, UnsupportedModelError
from svdllm.compression.estimate import Needs
from svdllm.compression.math.metrics import METHODS
from svdllm.compression.math.statistics import Gram
from svdllm.compression.probe import WINDOW, probe_ranks, probe_tokens
from svdllm.compression.ranks import Evidence
from svdllm.compression.ranks.budget import choose_ranks, elastic_bytes
from svdllm.compression.ranks.linear_times import LinearTimes, Speed
from svdllm.compression.ranks.predicted_sizes import QuantizedFiles, WrittenFiles
from svdllm.compression.recipe import Recipe
from svdllm.models.config_files import refuse_several_parts
from svdllm.models.discover import discover
from svdllm.models.limits import context_length, require_context
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.open import Source, open_config
from svdllm.models.skeleton import build_skeleton
from svdllm.models.structure import Structure, bias_corrected, with_joint_keys_and_values
from svdllm.models.unused_tensors import UnusedTensors


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
    allocation: str
    ranks_known: bool  # False where only the analysis can tell them, and uniform ones stand in
    predicted_loss: float | None  # nats per token, of an allocation by loss
    allocation_gap: float | None  # how far that may be above the least possible, as a share of it
    allocation_threshold: float | None  # nats per token, of an allocation by STRS
    target_speedup: float | None
    speed: Speed | None  # predicted, where time is the budget and the times are measured
    linear_times: LinearTimes | None  # by which it is predicted
    num_blocks: int
    num_groups: int
    targets: list[PlannedTarget]
    ignored: list[str]
    achieved_ratio: float
    params: int
    dense_params: int
    file_bytes: int
    dense_file_bytes: int
    factor_bits: int | None  # in which the target size counts the linears
    quantized_file_bytes: int | None  # of the files that `svdllm quantize` then makes
    elastic_bytes: int  # of the elastic files, beside file_bytes; the most it can be where ranks are not known
    ram_by_stage: dict[str, int]
    hidden_states_bytes: int
    hidden_states_on_disk: bool
    device_bytes: int
    disk_bytes: int
    seconds_by_stage: dict[str, float]
    unused_tensors: UnusedTensors | None = None  # in the model's files, as far as they are known
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

    def with_ranks_of(self, known: Plan) -> Plan:
        """The known plan, with what this one predicted of memory and time: it was made before the work."""
        predicted = ("ram_by_stage", "device_bytes", "disk_bytes", "seconds_by_stage", "hidden_states_on_disk")
        return replace(known, **{name: getattr(self, name) for name in predicted})

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
    recipe = recipe.within(context_length(source.config))
    return plan_each_ratio(source, *discover_targets(source, recipe), recipe, hidden_states_limit)


def plan_each_ratio(
    source: Source,
    skeleton: PreTrainedModel,
    structure: Structure,
    recipe: Recipe,
    hidden_states_limit: int | None,
    evidence: Evidence | None = None,
) -> list[Plan]:
    """One plan per ratio, for a model that is open and looked at.

    Without ``evidence``, uniform ranks stand in for those that only an analysis can tell.
    """
    gguf_bytes = 0 if source.gguf is None else source.gguf.stat().st_size
    return [
        make_plan(
            source,
            skeleton,
            structure,
            single,
            num_outputs=len(recipe.single()),
            gguf_bytes=gguf_bytes,
            hidden_states_limit=hidden_states_limit,
            evidence=evidence,
        )
        for single in recipe.single()
    ]


def discover_targets(source: Source, recipe: Recipe) -> tuple[PreTrainedModel, Structure]:
    """The skeleton of a model and what it is made of.

    Raises:
        InputError: the model is compressed already, or a pattern of the recipe matches nothing.
        UnsupportedModelError: its structure is not understood.
    """
    if info := LowRankInfo.of(source.config, source.name):
        named = f" ({info.source['id']})" if "id" in info.source else ""
        raise InputError(f"{source.name} is compressed already; compress its dense source{named}.")
    skeleton = build_skeleton(source.config)
    try:
        return skeleton, structure_for(skeleton, recipe)
    except UnsupportedModelError:
        refuse_several_parts(source.config, source.name)
        raise


def structure_for(skeleton: PreTrainedModel, recipe: Recipe) -> Structure:
    """What a model is made of, as a recipe compresses it. Raises InputError, UnsupportedModelError as ``discover_targets``."""
    structure = discover(skeleton, recipe.ignore)
    if recipe.joint_kv:
        structure = with_joint_keys_and_values(structure)
    return bias_corrected(structure) if recipe.bias_correction else structure


def make_plan(
    source: Source,
    skeleton: PreTrainedModel,
    structure: Structure,
    recipe: Recipe,
    *,
    num_outputs: int = 1,
    gguf_bytes: int = 0,
    hidden_states_limit: int | None = None,
    evidence: Evidence | None = None,
) -> Plan:
    """The plan of a single recipe for a model that is looked at already."""
    device = resolve_device(recipe.device)
    dtype = resolve_dtype(recipe.dtype, device, source.dtype)
    if recipe.needs_tokens:
        require_context(source.config, recipe.seqlen, "--seqlen")
    stored, buffers = stored_tensors(source, skeleton), buffer_names(skeleton)
    quantized = _quantized_files(source, skeleton, structure, recipe)
    files = quantized or WrittenFiles(stored, structure.targets, buffers=buffers)
    allocation = choose_ranks(recipe, structure, files, evidence)
    ranks = allocation.ranks
    written = compressed_tensors(stored, structure.targets, ranks)
    ranks_known = recipe.allocation == "uniform" or evidence is not None
    times = None if evidence is None else evidence.times
    # Of an unknown allocation by time it is only known that the model will not be larger than the dense one.
    most = stored if recipe.target_speedup is not None and not ranks_known else written
    needs = Needs(structure, skeleton, recipe, stored, most, device, dtype, gguf_bytes, hidden_states_limit)
    elastic = elastic_bytes(recipe, structure, stored, ranks, ranks_known)
    dense_linear = structure.num_target_params
    kept = sum(target.params(ranks.get(target.name)) for target in structure.targets)
    return Plan(
        model=source.name,
        model_type=source.config.model_type,
        dtype=str(source.dtype).removeprefix("torch."),
        device=str(device),
        compute_dtype=str(dtype).removeprefix("torch."),
        method=recipe.method,
        allocation="ranks" if recipe.ranks else recipe.allocation,
        ranks_known=ranks_known,
        predicted_loss=allocation.predicted_loss,
        allocation_gap=allocation.gap,
        allocation_threshold=allocation.threshold,
        target_speedup=recipe.target_speedup,
        speed=None if times is None else times.speed(structure.targets, ranks),
        linear_times=times,
        num_blocks=len(structure.blocks),
        num_groups=len({target.group for target in structure.targets}),
        targets=[
            PlannedTarget(
                name=target.name,
                out_features=target.out_features,
                in_features=target.in_features,
                rank=ranks.get(target.name),
                params=target.params(ranks.get(target.name)),
            )
            for target in structure.targets
        ],
        ignored=list(structure.ignored),
        achieved_ratio=(dense_linear - kept) / dense_linear,
        params=num_params(written, buffers),
        dense_params=num_params(stored, buffers),
        file_bytes=file_bytes(written),
        dense_file_bytes=file_bytes(stored),
        factor_bits=recipe.factor_bits,
        quantized_file_bytes=None if quantized is None else quantized.num_bytes(ranks),
        elastic_bytes=elastic,
        ram_by_stage=needs.ram_by_stage(),
        hidden_states_bytes=needs.hidden_states,
        hidden_states_on_disk=needs.hidden_states_on_disk,
        device_bytes=needs.device_bytes(),
        disk_bytes=needs.disk_bytes(num_outputs) + elastic,
        seconds_by_stage=needs.seconds_by_stage(num_outputs),
        unused_tensors=source.unused,
        warnings=calibration_warnings(structure, skeleton, recipe, recipe.samples * recipe.seqlen),
    )


def calibration_warnings(structure: Structure, skeleton: PreTrainedModel, recipe: Recipe, num_tokens: int) -> list[str]:
    """What to say about the amount of calibration text."""
    warnings = []
    widest = max(structure.targets, key=lambda target: target.in_features)
    if METHODS[recipe.method].statistic is Gram and num_tokens < widest.in_features:
        warnings.append(
            f"Only {num_tokens:,} calibration tokens ({recipe.samples} x {recipe.seqlen}), fewer than the widest input has "
            f"features ({widest.in_features:,}, {widest.name}): its Gram is singular and the result fits these tokens "
            f"only. Use at least {widest.in_features:,} tokens, better ten times as many."
        )
    if recipe.allocation == "strs" and (probed := probe_tokens(recipe, structure, skeleton)) < WINDOW:
        tried = sum(map(len, probe_ranks(recipe, structure).values()))
        warnings.append(
            f"Allocation strs measures the loss of {tried:,} truncations on {probed:,} tokens only: chance has a part in "
            f"which it takes. Use more --samples or --probe-share (now {recipe.probe_share}), or fewer --strs-ratios."
        )
    return warnings


def _quantized_files(
    source: Source, skeleton: PreTrainedModel, structure: Structure, recipe: Recipe
) -> QuantizedFiles | None:
    """Of the model as it will be quantised; None where the recipe does not say that it will."""
    if recipe.factor_bits is None:
        return None
    require_dtype(recipe.factor_bits, source.dtype, source.name)
    return QuantizedFiles.of(skeleton, structure.targets, source.dtype, recipe.factor_bits)
