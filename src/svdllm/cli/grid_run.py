"""Runs the grid of compare and ablate, writes its report and prints its table."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from svdllm.cli.console import ConsoleReporter, console, print_json
from svdllm.cli.generated import read_flags
from svdllm.cli.grid_options import EQUAL_BYTES, GridOptions
from svdllm.common.errors import InputError

if TYPE_CHECKING:
    from svdllm.comparison import Grid, Study, Variant
    from svdllm.comparison.report import GridReport

    Variants = Callable[[dict[str, Any], dict[str, Any] | None], tuple[Variant, ...]]

REPORT_EVERY = 120  # seconds, while the grid is made


def run_and_report(
    model: str,
    output: Path,
    variants: Variants,
    options: GridOptions,
    calibration: dict[str, Any],
    study: Study | None = None,
) -> None:
    """Makes and measures the grid, shows its table and leaves its report; ends with the first failure's exit code.

    ``variants`` makes the variants from the settings of all calibration and those of all training; ``calibration``
    are the flags of the former.
    """
    report = _reported(_grid(model, variants, options, calibration, study), output, options, study)
    if options.json:
        print_json(report.to_dict())
    else:
        console.print(_table(report))
        for record in report.failed:
            console.print(f"{record['name']} failed: {record['error']['message']}", style="red", soft_wrap=True)
        console.print(f"Report: {output / 'report.html'}", soft_wrap=True)
    if report.failed:
        raise typer.Exit(report.failed[0]["error"]["exit_code"])


def _grid(
    model: str, variants: Variants, options: GridOptions, calibration: dict[str, Any], study: Study | None
) -> Grid:
    from svdllm.comparison import Grid
    from svdllm.compression.recipe import Recipe
    from svdllm.models.limits import context_length
    from svdllm.models.model_names import short_name
    from svdllm.models.open import open_config

    given = read_flags(Recipe, calibration)
    device, dtype = given.get("device", "auto"), given.get("dtype", "auto")
    config = open_config(model, offline=options.offline, revision=options.revision).config
    subject = "methods compared" if study is None else study.summary
    # auto is the default of recipes
    made = variants({name: value for name, value in given.items() if value != "auto"}, options.training())
    return Grid(
        model=model,
        variants=made,
        ratios=_ratios(model, made, options),
        measures=options.measures(config, device, dtype),
        title=options.title or f"{short_name(model)}: {subject}",
        revision=options.revision,
        offline=options.offline,
    ).within(context_length(config))


def _ratios(model: str, variants: tuple[Variant, ...], options: GridOptions) -> tuple[float, ...]:
    """The ratios asked for, or those of models as large as the simulated ones.

    Raises:
        InputError: a ratio or a size is not one, cannot be reached or is given twice, or no method is simulated.
    """
    from svdllm.common.run_options import RunOptions
    from svdllm.comparison.simulated.variants import SIMULATED_SYSTEMS, ratios_of_equal_bytes
    from svdllm.comparison.table import NEAR

    if options.ratios != EQUAL_BYTES or options.target_size is not None:
        return options.different_ratios(model)
    run = RunOptions.of(offline=options.offline, revision=options.revision)
    ratios = ratios_of_equal_bytes(variants, model, run, NEAR)
    if not ratios:
        raise InputError(
            f"--ratios {EQUAL_BYTES}: none of the methods is simulated. Add one of {', '.join(SIMULATED_SYSTEMS)}, or "
            "give ratios."
        )
    return ratios


def _reported(grid: Grid, output: Path, options: GridOptions, study: Study | None) -> GridReport:
    """Runs a grid; its report is written from time to time, and when the run ends, however it ends."""
    from svdllm.comparison import run_grid
    from svdllm.comparison.report import GridReport, read_spectra_files, write_report

    command = shlex.join(["svdllm", *sys.argv[1:]])
    records: list[dict[str, Any]] = []
    written = time.monotonic()

    def write() -> GridReport:
        spectra = read_spectra_files(output)
        report = GridReport(grid=grid, records=records, spectra=spectra, command=command, study=study)
        write_report(report, output)
        return report

    def on_cell(found: list[dict[str, Any]]) -> None:
        nonlocal records, written
        records = found
        if time.monotonic() - written > REPORT_EVERY:
            write()
            written = time.monotonic()

    try:
        keep = options.keep or options.bench
        records = run_grid(grid, output, keep=keep, bench=options.bench, reporter=ConsoleReporter(), on_cell=on_cell)
    finally:
        report = write() if records else None
    assert report is not None
    return report


def _table(report: GridReport) -> Table:
    table = Table(header_style="bold", title=report.grid.title)
    for heading in ("ratio", "method", "files", *(column.heading for column in report.columns)):
        table.add_column(heading, justify="left" if heading in ("ratio", "method") else "right")
    for group in report.groups:
        for row in group.rows:
            cells = [f"{entry.text}{' *' if entry.best else ''}" for entry in row.entries] or ["failed"]
            table.add_row(group.title, row.method, row.size, *cells)
        table.add_section()
    table.caption = "* best of the ratio; standard errors are in the report"
    return table
