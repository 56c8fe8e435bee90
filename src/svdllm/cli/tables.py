"""Results of runs and checkpoints as tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from svdllm.checkpoint.card import quantization_text, recovery_text
from svdllm.checkpoint.report import form_of
from svdllm.cli.console import count, duration, size
from svdllm.compression.forms import bits_of, in_few_bits
from svdllm.compression.plan import Plan
from svdllm.compression.records import CompressionResult
from svdllm.evaluation.perplexity import perplexity_text
from svdllm.evaluation.side_by_side import ModelPerplexity
from svdllm.models.left_dense import DensePart
from svdllm.models.model_names import given_name
from svdllm.models.quantized_sources.methods import QuantizedSource
from svdllm.models.unused_tensors import UnusedTensors
from svdllm.models.wrapped import OutsidePart

if TYPE_CHECKING:  # importing these takes a second that most commands need not spend
    from svdllm.comparison.demo import DemoResult
    from svdllm.recovery import RecoveryResult

LEAST_SHOWN = 0.005  # share of the blocks' parameters

Titled = tuple[str, list[Table]]  # a title, which is never cut or wrapped, and the tables below it


def result_table(result: CompressionResult) -> Titled:
    """The checkpoint that a run made: size, allocation, kept energy, time and memory."""
    plan = result.plan
    table = summary_table()
    table.add_row("method", f"{plan.recipe.method}, {plan.achieved_ratio:.2%} of the linears' parameters removed")
    add_sizes(table, plan)
    if plan.sizes.elastic_bytes:
        table.add_row("elastic files", f"{size(plan.sizes.elastic_bytes)} beside them, for `svdllm slice`")
    changed = [linear for linear in result.linears if linear.size is not None]
    table.add_row("allocation", allocation_text(plan))
    if any(map(in_few_bits, plan.forms.values())):
        table.add_row("bits", f"{plan.sizes.bits_per_weight:.2f} per weight of the linears, scales included")
        if all(bits_of(chosen) is not None for chosen in plan.forms.values()):
            table.add_row("low rank", "none: at this size, few bits alone are predicted to lose less")
    if plan.speed is not None:
        table.add_row("linears, predicted", speed_text(asdict(plan.speed)))
    if changed:
        worst = min(changed, key=lambda linear: linear.kept_energy)
        mean = sum(linear.kept_energy for linear in changed) / len(changed)
        table.add_row("kept energy", f"{mean:.4f} on average, least {worst.kept_energy:.4f} ({worst.name})")
    stages = ", ".join(f"{name} {duration(seconds)}" for name, seconds in result.seconds.items() if seconds >= 0.5)
    table.add_row("time", f"{duration(sum(result.seconds.values()))} ({stages})")
    table.add_row("peak memory", f"{size(result.peak_ram_bytes)} (planned {size(plan.peak_ram_bytes)})")
    if result.peak_device_bytes:
        table.add_row(
            f"peak on {plan.needs.device}",
            f"{size(result.peak_device_bytes)} (planned {size(plan.needs.device_bytes)})",
        )
    return str(result.output_dir), [table]


def perplexity_table(rows: list[ModelPerplexity]) -> Table:
    """Perplexity, a row for every model and text."""
    table = Table(header_style="bold")
    for column in ("model", "params", "files", "text", "perplexity", "s.e.", "tokens"):
        named = column in ("model", "text")
        table.add_column(column, justify="left" if named else "right", overflow="fold", no_wrap=not named)
    for row in rows:
        table.add_row(given_name(row.model), count(row.params), size(row.weight_bytes), row.text, *_measured(row))
    if rows:
        measured = rows[0].perplexity
        bos = {True: "BOS at the start of the text", False: "no BOS", None: "BOS unknown"}[measured.begins_with_bos]
        table.caption = (
            f"protocol {measured.protocol}: {measured.num_windows} windows of {measured.seqlen} tokens, {bos}; "
            "s.e.: standard error over windows"
        )
    return table


def recovery_table(result: RecoveryResult) -> Titled:
    """The stages of a recovery, and perplexity before, after and of the dense model."""
    table = summary_table()
    table.add_row("method", ", ".join(result.settings.methods))
    table.add_row("tokens", f"{result.tokens:,} in {sum(stage.steps for stage in result.stages):,} steps")
    for stage in result.stages:
        trained = f"{count(stage.trained_params)} parameters, {duration(stage.seconds)}"
        ends = f", loss {stage.losses[0][1]:.3f} -> {stage.losses[-1][1]:.3f}" if stage.losses else ""
        table.add_row(stage.stage, f"{trained}{ends}")
    table.add_row("peak memory", size(result.peak_ram_bytes))
    measured = Table(header_style="bold")
    for column in ("text", "model", "perplexity", "s.e.", "tokens"):
        measured.add_column(column, justify="left" if column in ("text", "model") else "right")
    for text, rows in result.perplexity.items():
        for name in ("before", "after", "teacher"):
            if name in rows:
                row = rows[name]
                stderr = "" if row.stderr is None else f"{row.stderr:.2f}"
                measured.add_row(text, name, f"{row.perplexity:.2f}", stderr, f"{row.num_tokens:,}")
    return str(result.output_dir), [table, measured] if result.perplexity else [table]


def demo_table(result: DemoResult) -> Table:
    """Dense, plain SVD, SVD-LLM as published and the default preset side by side, within 80 columns."""
    title = "SmolLM2-135M-Instruct on held-out Python documentation"
    table = Table(title=title, header_style="bold", pad_edge=False)
    for column in ("model", "params", "files", "perplexity", "times dense", "made in"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    dense = result.rows[0]
    for row in result.rows:
        table.add_row(
            row.name,
            count(row.params),
            size(row.weight_bytes),
            _with_error(row.perplexity, row.stderr),
            "" if row is dense else _with_error(*row.times(dense)),
            "" if row.compression_seconds is None else duration(row.compression_seconds),
        )
    table.caption = "± standard error over windows; for times dense, over the differences by window"
    return table


def _with_error(value: float, stderr: float) -> str:
    return f"{perplexity_text(value)} ± {perplexity_text(stderr)}"


def report_table(report: dict[str, Any]) -> Titled:
    """A checkpoint's report, without its linears."""
    source, recipe = report["source"], report["recipe"]
    table = summary_table()
    table.add_row("method", f"{report['method']}, {report['achieved_ratio']:.2%} of the linears' parameters removed")
    table.add_row("parameters", f"{count(report['dense_params'])} -> {count(report['params'])}")
    table.add_row("weight files", f"{size(report['dense_file_bytes'])} -> {size(report['file_bytes'])}")
    if report.get("elastic_bytes"):
        table.add_row("elastic files", f"{size(report['elastic_bytes'])} beside them, for `svdllm slice`")
    if quantized := report.get("quantization"):
        table.add_row("quantised", quantization_text(quantized))
    elif later := report.get("quantized_file_bytes"):
        table.add_row("once quantised", quantized_text(later, recipe["factor_bits"]))
    if sliced := report.get("sliced_from"):
        table.add_row("sliced from", f"an elastic checkpoint of ratio {sliced['ratio']}")
    chosen = report["allocation"]
    loss = "" if chosen["predicted_loss"] is None else f"; predicted loss {chosen['predicted_loss']:.3f} nats per token"
    loss += threshold_text(chosen.get("threshold"))
    table.add_row("allocation", f"{chosen['name']}: {counts_text(map(form_of, report['linears']))}{loss}")
    if speed := report.get("speed"):
        table.add_row("linears, predicted", speed_text(speed))
    add_dense_parts(table, [DensePart(**part) for part in report.get("dense_parts", [])])
    add_outside_parts(table, [OutsidePart(**part) for part in report.get("outside_parts", [])])
    if "metric" in recipe:  # a pruned model has none
        table.add_row("metric", f"{recipe['metric']}, {recipe['calibration_mode']} calibration")
    table.add_row("source weights", f"{source['weights_fingerprint'][:16]}, revision {source['revision'] or 'none'}")
    if quantized := report.get("quantized_source"):
        table.add_row("source files", quantized_source_text(QuantizedSource(**quantized)))
    if source["calibration"]:
        table.add_row(
            "calibration",
            f"{source['calibration']}, {source['calibration_tokens']:,} tokens, windows of {recipe['seqlen']}, "
            f"seed {recipe['seed']}",
        )
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    if unused := report.get("unused_tensors"):
        table.add_row("source files hold", UnusedTensors(**unused).text)
    for warning in report["warnings"]:
        table.add_row("warning", warning)
    for entry in report.get("recovery", []):
        table.add_row("trained", recovery_text(entry))
    return f"{source['model']}, compressed", [table]


def quantized_source_text(source: QuantizedSource) -> str:
    """How a source is quantised, and the bytes of its files as far as they are known."""
    return source.text + ("" if source.file_bytes is None else f"; its weight files have {size(source.file_bytes)}")


def add_dense_parts(table: Table, parts: Sequence[DensePart]) -> None:
    """Adds a row for what stays as it is inside the blocks; what is less than 0.5 % of them is summed up."""
    large = [part for part in parts if part.share >= LEAST_SHOWN]
    small = sum(part.share for part in parts if part.share < LEAST_SHOWN)
    lines = [part.text for part in large] + ([f"{small:.2%} norms and other small parts"] if small else [])
    if lines:
        table.add_row("left as they are", "\n".join(lines))


def add_outside_parts(table: Table, parts: Sequence[OutsidePart]) -> None:
    """Adds a row for the parts of a wrapper that are copied."""
    if parts:
        share = sum(part.share for part in parts)
        names = ", ".join(part.text for part in parts)
        table.add_row("outside the language model", f"{share:.1%} of all weights, copied: {names}")


def linears_table(linears: list[dict[str, Any]], *, every: bool) -> Table:
    """Form, size and kept energy of every linear, or of every kind of linear over the blocks."""
    table = Table(header_style="bold", box=None, padding=(0, 1))
    for column in ("linear", "shape", "rank or width", "kept energy", "least"):
        table.add_column(column, justify="left" if column == "linear" else "right", no_wrap=True)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in linears:
        groups.setdefault(row["name"] if every else kind_of(row["name"]), []).append(row)
    for name, rows in groups.items():
        kept = [row["kept_energy"] for row in rows if row["kept_energy"] is not None]  # of a pruned one none is known
        table.add_row(
            name,
            f"{rows[0]['out_features']} x {rows[0]['in_features']}",
            size_range([(form_of(row), row.get("size", row["rank"])) for row in rows]),
            f"{sum(kept) / len(kept):.4f}" if kept else "",
            f"{min(kept):.4f}" if kept else "",
        )
    return table


def allocation_text(plan: Plan) -> str:
    """How forms were chosen, and how close to the optimum they are known to be."""
    text = f"{plan.allocation_name}: {counts_text(target.form for target in plan.targets)}"
    if plan.allocation.predicted_loss is not None and plan.allocation.gap is not None:
        proof = "proven least" if plan.allocation.gap <= 1e-6 else f"within {plan.allocation.gap:.1e} of the least"
        text += f"; predicted loss {plan.allocation.predicted_loss:.3f} nats per token, {proof}"
    return text + threshold_text(plan.allocation.threshold)


def counts_text(forms: Iterable[str]) -> str:
    """The number of linears in each form, as in ``120 packed, 90 narrow linears``."""
    return ", ".join(f"{number} {form}" for form, number in Counter(forms).most_common()) + " linears"


def add_sizes(table: Table, plan: Plan) -> None:
    """Adds the rows of a model's sizes, before and after."""
    table.add_row("parameters", f"{count(plan.dense_params)} -> {count(plan.params)}")
    table.add_row("weight files", f"{size(plan.sizes.dense_file_bytes)} -> {size(plan.file_bytes)}")
    if plan.sizes.quantized_file_bytes is not None:
        table.add_row("once quantised", quantized_text(plan.sizes.quantized_file_bytes, plan.recipe.factor_bits))


def quantized_text(num_bytes: int, bits: int | None) -> str:
    """The size after quantising that the ranks were chosen for."""
    return f"at most {size(num_bytes)}, by `svdllm quantize` with --bits {bits} --format torchao"


def threshold_text(threshold: float | None) -> str:
    """The bound on the loss of every linear alone that STRS found; empty for other allocations."""
    return "" if threshold is None else f"; none alone takes the loss above {threshold:.3f} nats per token"


def speed_text(speed: dict[str, Any]) -> str:
    """The predicted speed of all linears together, from an allocation that counts time."""
    dense, compressed = speed["dense_ns"] / 1e6, speed["compressed_ns"] / 1e6
    at_once = "a token" if speed["tokens"] == 1 else f"{speed['tokens']:,} tokens at once"
    where = f"on {speed['device']} in {speed['dtype']}"
    return f"{speed['speedup']:.2f} times as fast: {dense:.3g} -> {compressed:.3g} ms for {at_once}, {where}"


def kind_of(name: str) -> str:
    """``model.layers.*.mlp.up_proj`` for every block's up projection, and every expert's."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def summary_table() -> Table:
    table = Table(show_header=False, box=None, padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _measured(row: ModelPerplexity) -> tuple[str, str, str]:
    measured = row.perplexity
    stderr = "" if measured.stderr is None else _number(measured.stderr)
    return _number(measured.perplexity), stderr, f"{measured.num_tokens:,}"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1e5 else f"{value:.2e}"


def size_range(chosen: Iterable[tuple[str, int | None]]) -> str:
    """The least and largest size in each form, as in ``8 to 96 packed, 3 dense``."""
    found: dict[str, list[int | None]] = {}
    for form, of_one in chosen:
        found.setdefault(form, []).append(of_one)
    texts = []
    for form, sizes in found.items():
        known = sorted({of_one for of_one in sizes if of_one is not None})
        between = str(len(sizes)) if not known else str(known[0]) if len(known) == 1 else f"{known[0]} to {known[-1]}"
        texts.append(between if form == "pair" else f"{between} {form}")
    return ", ".join(texts)
