"""``svdllm ablate``: what a method is sensitive to."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from svdllm.cli import grid_options as g
from svdllm.cli import options as o
from svdllm.comparison import STUDIES, find_study, study

DESCRIPTIONS = "; ".join(f"{name}: {chosen.summary}" for name, chosen in STUDIES.items())


def register(app: typer.Typer) -> None:
    app.command("ablate")(ablate)


@g.sharing_options(ratios="0.2", new_tokens=0)
def ablate(
    model: o.Model,
    output: g.Output,
    study_name: Annotated[str, typer.Option("--study", help=f"What varies. {DESCRIPTIONS}.", show_default=False)],
    values: Annotated[
        str | None, typer.Option(help="Its values, as in 16,64,256.", show_default="the study's own")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="The method, as for svdllm compare.", show_default="svd-llm")
    ] = None,
    **shared: Any,
) -> None:
    """Varies one thing of a method, all else equal, and writes a report with a plot: the paper's sensitivity studies.

    [bold]svdllm ablate MODEL -o REPORT --study samples --values 16,64,256 --ratios 0.2,0.4[/bold]

    [bold]svdllm ablate MODEL -o REPORT --study order --recover 'data: alpaca.json'[/bold]

    The same command goes on with a killed run, and one with more values or ratios adds to the report.
    """
    chosen = find_study(study_name)
    asked = [] if values is None else g.names_of(values)
    g.run_and_report(
        model,
        output,
        lambda calibration, recover: study(study_name, asked, method, calibration, recover, teacher=model),
        chosen,
        **shared,
    )
