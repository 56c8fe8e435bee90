"""Speed and memory as tables."""

from __future__ import annotations

from rich.table import Table

from svdllm.cli.console import console, count, size
from svdllm.inference.bench import BenchmarkRecord, CellRecord, ModelRecord, PhaseRecord


def show_benchmark(record: BenchmarkRecord) -> None:
    """Prints a benchmark: a line for every model, its speed and memory, failures and findings."""
    for model in record.models:
        console.print(model_line(model, record), soft_wrap=True)
    for name in record.compressed:
        console.print(speed_table(record, name))
    console.print(memory_table(record))
    failed = [f"{cell.model} at {cell.batch} x {cell.prompt}: {cell.error}" for cell in record.cells if cell.error]
    for line in [*failed, *record.findings]:
        console.print(line, soft_wrap=True)


def model_line(model: ModelRecord, record: BenchmarkRecord) -> str:
    """The size of a model, and the speed-up that the size of its linears alone would allow."""
    text = f"{model.name}: {count(model.params)} parameters, {size(model.parameter_bytes)}"
    dense = next((other for other in record.models if other.name == record.base), None)
    if dense is not None and model is not dense:
        text += f"; ideal of the linears alone {dense.linears / model.linears:.2f}"
    return text + (f"; first factors fused in {model.fused_groups} groups" if model.fused_groups else "")


def speed_table(record: BenchmarkRecord, name: str) -> Table:
    """Prefill and decode of a compressed model in every cell, beside those of the dense model."""
    compared = record.base is not None
    title = f"{name} against {record.base}" if compared else name
    table = Table(header_style="bold", box=None, padding=(0, 1, 0, 0), title=title)
    headings = ["batch", "prompt", "phase", "tokens/s", "ms"]
    if compared:
        headings[3:4] = ["dense\ntokens/s", "\ntokens/s"]
        headings += ["speed-up", "ideal", "reached"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    dense = {(cell.batch, cell.prompt): cell for cell in record.of(record.base)} if record.base is not None else {}
    for cell in record.of(name):
        beside = dense.get((cell.batch, cell.prompt))
        if cell.error is not None:
            table.add_row(str(cell.batch), str(cell.prompt), "out of memory")
        for phase, found in cell.phases.items():
            row = [str(cell.batch), str(cell.prompt), phase]
            if compared:
                row.append("" if beside is None or beside.error else f"{beside.phases[phase].tokens_per_second:,.0f}")
            row += [f"{found.tokens_per_second:,.0f}", f"{_milliseconds(cell, phase):.1f}"]
            table.add_row(*row, *(_against_dense(found) if compared else []))
    table.caption = (
        f"{_machine(record)}; ms: to the first token, or of one decode step; median of {record.settings['repeats']} "
        "turns" + ("; speed-up: median [quartiles]; ideal of the whole model, share of it reached" if compared else "")
    )
    return table


def memory_table(record: BenchmarkRecord) -> Table:
    """The peak memory of every model, by what it was used for."""
    table = Table(header_style="bold", box=None, padding=(0, 1, 0, 0), title="Memory")
    for heading in ("batch", "prompt", "model", "weights", "cache", "activations", "peak"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for cell in sorted(record.cells, key=lambda cell: (cell.batch, cell.prompt)):
        row = [str(cell.batch), str(cell.prompt), cell.model]
        if cell.memory is None:
            table.add_row(*row, "out of memory")
        else:
            used = cell.memory
            table.add_row(*row, *map(size, (used.weights, used.cache, used.activations, used.peak)))
    return table


def _machine(record: BenchmarkRecord) -> str:
    machine = record.machine
    threads = f", {machine['threads']} threads" if machine["device_type"] == "cpu" else ""
    return f"{machine['device']}{threads}, {machine['dtype']}"


def _milliseconds(cell: CellRecord, phase: str) -> float:
    seconds = cell.phases[phase].seconds.median
    return 1000 * (seconds if phase == "prefill" else seconds / cell.gen)


def _against_dense(phase: PhaseRecord) -> list[str]:
    assert phase.ideal is not None
    if phase.speed_up is None or phase.reached is None:
        return ["dense out of memory", f"{phase.ideal.model:.2f}", ""]
    return [str(phase.speed_up), f"{phase.ideal.model:.2f}", f"{phase.reached.model:.0%}"]
