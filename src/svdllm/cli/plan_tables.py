"""A plan as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from svdllm.cli.console import duration_range, size
from svdllm.cli.tables import (
    Titled,
    add_dense_parts,
    add_outside_parts,
    add_sizes,
    kind_of,
    quantized_source_text,
    size_range,
    summary_table,
)
from svdllm.compression.plan import Plan, PlannedTarget


def plan_table(plan: Plan) -> Titled:
    """A plan: sizes, memory, disk and time of the run, then the linears by kind."""
    title = f"{plan.model} ({plan.model_type}, {plan.dtype}), method {plan.recipe.method}"
    summary = summary_table()
    targets = plan.targets
    dense_left = sum(target.size is None for target in targets)
    summary.add_row(
        "linears",
        f"{len(plan.forms)} in {len(plan.structure.blocks)} blocks, {plan.num_groups} distinct inputs"
        + (f"; {dense_left} stay dense" if dense_left else "")
        + (f"; {len(plan.structure.ignored)} ignored" if plan.structure.ignored else ""),
    )
    add_dense_parts(summary, plan.structure.dense_parts)
    add_outside_parts(summary, plan.structure.outside)
    if plan.quantized_source is not None:
        summary.add_row("source files", quantized_source_text(plan.quantized_source))
    if plan.unused_tensors is not None:
        summary.add_row("its files hold", plan.unused_tensors.text)
    if not plan.forms_known and plan.recipe.target_speedup is None:
        summary.add_row(
            "allocation",
            f"{plan.allocation_name}: forms follow from the analysis; uniform ranks are shown, of the same size",
        )
    elif not plan.forms_known:
        summary.add_row(
            "allocation",
            f"{plan.allocation_name}, linears {plan.recipe.target_speedup:g} times as fast: ranks and size follow from "
            "the analysis and from times measured then; uniform ranks are shown, as if time were parameters",
        )
    summary.add_row("removed of the linears", f"{plan.achieved_ratio:.2%}")
    add_sizes(summary, plan)
    if plan.sizes.elastic_bytes:
        summary.add_row(
            "elastic files", f"{'' if plan.forms_known else 'at most '}{size(plan.sizes.elastic_bytes)} beside them"
        )
    each = f", each of {plan.needs.processes} processes" if plan.needs.processes > 1 else ""
    stage = max(plan.needs.ram_by_stage, key=lambda name: plan.needs.ram_by_stage[name])
    summary.add_row("peak memory", f"{size(plan.peak_ram_bytes)} (stage: {stage}){each}")
    if plan.needs.device_bytes:
        summary.add_row(f"peak on {plan.needs.device}", size(plan.needs.device_bytes))
    where = "on disk" if plan.needs.hidden_states_on_disk else "in memory"
    summary.add_row("hidden states", f"{size(plan.needs.hidden_states_bytes)}, {where}")
    if plan.needs.experts_on_disk:
        summary.add_row("weights of experts", "on disk while their block is loaded, which does not fit into memory")
    summary.add_row("disk while it runs", size(plan.needs.disk_bytes))
    if each:
        summary.add_row("from the others", f"{size(plan.needs.network_bytes)}{each}")
    time = duration_range(*plan.needs.seconds_range)
    summary.add_row("time", f"about {time} on {plan.needs.device} in {plan.needs.compute_dtype}")
    return title, [summary, _kinds_table(targets)]


def _kinds_table(targets: Sequence[PlannedTarget]) -> Table:
    """Shape and sizes of the linears, a row for every kind."""
    kinds = Table(box=None, padding=(0, 1), header_style="bold")
    for column in ("linear", "count", "shape", "rank or width"):
        kinds.add_column(column, justify="left" if column == "linear" else "right")
    rows: dict[tuple[str, int, int], list[tuple[str, int | None]]] = {}
    for target in targets:
        rows.setdefault((kind_of(target.name), target.out_features, target.in_features), []).append(
            (target.form, target.size)
        )
    for (kind, out_features, in_features), chosen in rows.items():
        kinds.add_row(kind, str(len(chosen)), f"{out_features} x {in_features}", size_range(chosen))
    return kinds
