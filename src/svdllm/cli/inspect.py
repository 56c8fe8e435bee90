"""``svdllm inspect``: what a checkpoint is."""

from __future__ import annotations

from typing import Annotated

from svdllm.cli import options as o
from svdllm.cli.console import console, print_json, show

Linears = Annotated[bool, o.option("Every linear instead of a row per kind.", None, False, "--linears")]


def inspect(folder: o.Checkpoint, linears: Linears = False, json: o.Json = False) -> None:
    """Prints what a checkpoint is: sizes, recipe, source, and the rank and loss of its linears."""
    from svdllm.checkpoint.report import read_report
    from svdllm.cli.tables import linears_table, report_table

    report = read_report(folder)
    if json:
        print_json(report)
        return
    show(report_table(report))
    console.print(linears_table(report["linears"], every=linears))
