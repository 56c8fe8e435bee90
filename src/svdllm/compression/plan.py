"""Plans a run: what it compresses, to which size, and what it needs, from configs and shapes alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from svdllm.common.errors import InputError
from svdllm.compression.forms import rank_of
from svdllm.compression.forms.layout import params
from svdllm.compression.needs import RunNeeds, needs_of
from svdllm.compression.plan_warnings import plan_warnings
from svdllm.compression.ranks import ALLOCATIONS, Allocation, Evidence
from svdllm.compression.ranks.budget import choose_forms, require_places
from svdllm.compression.ranks.linear_times import LinearTimes, Speed
from svdllm.compression.recipe import Recipe
from svdllm.compression.sizes import Sizes, files_for, sizes_of
from svdllm.compression.subject import Subject, discover_subject
from svdllm.models.chosen import Forms
from svdllm.models.limits import context_length, require_context
from svdllm.models.open import open_config
from svdllm.models.quantized_sources.methods import QuantizedSource
from svdllm.models.structure import Structure
from svdllm.models.unused_tensors import UnusedTensors


@dataclass(frozen=True, kw_only=True)
class PlannedTarget:
    """One linear of the plan; ``size`` is None where it stays dense, ``rank`` also where its MLP is narrowed."""

    name: str
    out_features: int
    in_features: int
    form: str
    size: int | None
    rank: int | None
    params: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of one checkpoint.

    It is made from shapes. An allocation that needs an analysis is planned with uniform ranks of the same size
    (``forms_known`` is False), and ``refine`` puts in its forms once the analysis is done.
    """

    model: str
    model_type: str
    dtype: str  # of the model's weights, which the checkpoint keeps
    unused_tensors: UnusedTensors | None  # in the model's files, as far as they are known
    quantized_source: QuantizedSource | None  # where the model's files are quantised
    recipe: Recipe  # with one budget
    structure: Structure
    allocation: Allocation
    forms_known: bool
    sizes: Sizes
    needs: RunNeeds
    speed: Speed | None = None  # predicted, where time is the budget and the linears were timed
    linear_times: LinearTimes | None = None  # the times by which it is predicted
    warnings: list[str] = field(default_factory=list)

    @property
    def allocation_name(self) -> str:
        return "ranks" if self.recipe.ranks else self.recipe.allocation

    @property
    def forms(self) -> Forms:
        """Target -> form and size; targets that stay dense are not in it."""
        return self.allocation.forms

    @property
    def achieved_ratio(self) -> float:
        """Share of the targets' parameters that is removed."""
        return self.sizes.achieved_ratio

    @property
    def params(self) -> int:
        return self.sizes.params

    @property
    def dense_params(self) -> int:
        return self.sizes.dense_params

    @property
    def file_bytes(self) -> int:
        return self.sizes.file_bytes

    @property
    def peak_ram_bytes(self) -> int:
        return self.needs.peak_ram_bytes

    @property
    def targets(self) -> list[PlannedTarget]:
        planned = []
        for target in self.structure.targets:
            chosen = self.forms.get(target.name)
            planned.append(
                PlannedTarget(
                    name=target.name,
                    out_features=target.out_features,
                    in_features=target.in_features,
                    form="dense" if chosen is None else chosen.form,
                    size=None if chosen is None else chosen.size,
                    rank=rank_of(chosen),
                    params=params(target, chosen),
                )
            )
        return planned

    @property
    def num_groups(self) -> int:
        """Number of distinct inputs that the targets read."""
        return len({target.group for target in self.structure.targets})

    def to_dict(self) -> dict[str, Any]:
        """One flat mapping of all parts, as ``svdllm plan --json`` prints it."""
        return {
            "model": self.model,
            "model_type": self.model_type,
            "dtype": self.dtype,
            "method": self.recipe.method,
            "allocation": self.allocation_name,
            "ranks_known": self.forms_known,
            "predicted_loss": self.allocation.predicted_loss,
            "allocation_gap": self.allocation.gap,
            "allocation_threshold": self.allocation.threshold,
            "target_speedup": self.recipe.target_speedup,
            "speed": None if self.speed is None else asdict(self.speed),
            "linear_times": None if self.linear_times is None else asdict(self.linear_times),
            "num_blocks": len(self.structure.blocks),
            "num_groups": self.num_groups,
            "targets": [asdict(target) for target in self.targets],
            "ignored": list(self.structure.ignored),
            "num_block_params": self.structure.num_block_params,
            "dense_parts": [asdict(part) for part in self.structure.dense_parts],
            "outside_parts": [asdict(part) for part in self.structure.outside],
            "ratio": self.recipe.ratio,
            "factor_bits": self.recipe.factor_bits,
            **asdict(self.sizes),
            **asdict(self.needs),
            "peak_ram_bytes": self.needs.peak_ram_bytes,
            "seconds": self.needs.seconds,
            "quantized_source": None if self.quantized_source is None else asdict(self.quantized_source),
            "unused_tensors": None if self.unused_tensors is None else asdict(self.unused_tensors),
            "warnings": list(self.warnings),
        }


def plan(
    model: str | Path | PreTrainedModel,
    recipe: Recipe,
    *,
    offline: bool = False,
    revision: str | None = None,
    hidden_states_limit: int | None = None,
    processes: int = 1,
) -> list[Plan]:
    """Plans a run from configs and file headers; of a hub model, only its config is fetched.

    A folder may hold no more than a config. The plan then takes the weights as the config describes them.
    ``processes`` share the run, and memory is that of one of them. Returns one plan per ratio of the recipe.

    Raises:
        InputError, UnsupportedModelError: as ``compress`` would, before any work.
    """
    recipe.require_budget()
    source = open_config(model, offline=offline, revision=revision, require_weights=False)
    recipe = recipe.within(context_length(source.config))
    plans = plan_each_ratio(discover_subject(source, recipe), recipe, hidden_states_limit, processes)
    if source.weights is None and not isinstance(model, PreTrainedModel) and Path(model).is_dir():
        warning = f"{source.name} holds no weights: the plan is of its config alone."
        return [replace(single, warnings=[*single.warnings, warning]) for single in plans]
    return plans


def plan_each_ratio(
    subject: Subject, recipe: Recipe, hidden_states_limit: int | None, processes: int = 1
) -> list[Plan]:
    """One plan per ratio of a recipe, with uniform ranks in place of those that only an analysis can tell."""
    singles = recipe.single()
    machine = {"num_outputs": len(singles), "hidden_states_limit": hidden_states_limit, "processes": processes}
    return [make_plan(subject, single, **machine) for single in singles]


def make_plan(
    subject: Subject,
    recipe: Recipe,
    *,
    num_outputs: int = 1,
    hidden_states_limit: int | None = None,
    processes: int = 1,
) -> Plan:
    """The plan of a recipe with one budget.

    Args:
        num_outputs: checkpoints that the run writes in all, for its disk and time.
        hidden_states_limit: bytes of hidden states that a process keeps in RAM; by default its part of half of what is
            free.
        processes: that share the run.
    """
    source, structure = subject.source, subject.structure
    if recipe.needs_tokens:
        require_context(source.config, recipe.seqlen, "--seqlen")
    require_places(recipe, structure)
    if recipe.elastic and structure.pools:
        raise InputError(
            f"--elastic cannot be used for {source.name}: it is a mixture of experts, whose smaller sizes cannot be "
            "sliced yet. Leave out --elastic and give several ratios, as in --ratio 0.2,0.4."
        )
    known = not ALLOCATIONS[recipe.allocation].needs_spectra
    allocation, sizes = _allocate(subject, recipe, None, forms_known=known)
    return Plan(
        model=source.name,
        model_type=source.config.model_type,
        dtype=str(source.dtype).removeprefix("torch."),
        unused_tensors=source.unused,
        quantized_source=source.quantization,
        recipe=recipe,
        structure=structure,
        allocation=allocation,
        forms_known=known,
        sizes=sizes,
        needs=needs_of(
            subject,
            recipe,
            sizes,
            forms_known=known,
            num_outputs=num_outputs,
            hidden_states_limit=hidden_states_limit,
            processes=processes,
        ),
        warnings=plan_warnings(subject, recipe, sizes),
    )


def refine(plan: Plan, subject: Subject, evidence: Evidence) -> Plan:
    """Puts the forms that follow from the evidence into a plan, and the sizes and the speed that follow from them.

    Needs stay as they were predicted before the work.
    """
    allocation, sizes = _allocate(subject, plan.recipe, evidence, forms_known=True)
    times = evidence.times
    return replace(
        plan,
        allocation=allocation,
        forms_known=True,
        sizes=sizes,
        speed=None if times is None else times.speed(subject.structure.targets, allocation.forms),
        linear_times=times,
    )


def _allocate(
    subject: Subject, recipe: Recipe, evidence: Evidence | None, *, forms_known: bool
) -> tuple[Allocation, Sizes]:
    files = files_for(subject, recipe)
    allocation = choose_forms(recipe, subject.structure, files, evidence)
    return allocation, sizes_of(subject, recipe, files, allocation.forms, forms_known=forms_known)
