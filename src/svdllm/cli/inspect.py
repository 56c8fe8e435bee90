"""``svdllm inspect``: what a checkpoint is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdllm.checkpoint.report import read_report
from svdllm.cli import options as o
from svdllm.cli.console import console, print_json, show
from svdllm.cli.tables import linears_table, report_table


def register(app: typer.Typer) -> None:
    app.command("inspect")(inspect)


def inspect(
    folder: Annotated[Path, typer.Argument(help="A checkpoint made by svdllm.", show_default=False)],
    linears: Annotated[bool, typer.Option("--linears", help="Every linear instead of a row per kind.")] = False,
    json: o.Json = False,
) -> None:
    """Prints what a checkpoint is: sizes, recipe, source, and the rank and loss of its linears."""
    report = read_report(folder)
    if json:
        print_json(report)
        return
    show(report_table(report))
    console.print(linears_table(report["linears"], every=linears))
