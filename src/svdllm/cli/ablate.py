"""``svdllm ablate``: what a method is sensitive to."""

from __future__ import annotations

from inspect import Parameter
from typing import Annotated, Any

from svdllm.cli import grid_options as g
from svdllm.cli import options as o
from svdllm.cli.commands import takes
from svdllm.cli.readers import read_names

Values = Annotated[str | None, o.option("Values of it, as in 16,64,256.", None, "the study's own")]
Method = Annotated[str | None, o.option("The method, as for svdllm compare.", None, "svd-llm")]


def study_options() -> list[Parameter]:
    """The option --study, which describes the studies that there are."""
    from svdllm.comparison import STUDIES

    studies = "; ".join(f"{name}: {study.summary}" for name, study in STUDIES.items())
    option = o.option(f"What varies. {studies}.", None, False, "--study")
    return [Parameter("study_name", Parameter.KEYWORD_ONLY, annotation=Annotated[str, option])]


@takes(g.shared_options(study_options, ratios="0.2", new_tokens=0))
def ablate(model: o.Model, output: g.Output, values: Values = None, method: Method = None, **options: Any) -> None:
    """Varies one thing of a method, all else equal, and writes a report with a plot: the paper's sensitivity studies.

    [bold]svdllm ablate MODEL -o REPORT --study samples --values 16,64,256 --ratios 0.2,0.4[/bold]

    [bold]svdllm ablate MODEL -o REPORT --study order --recover 'data: alpaca.json'[/bold]

    The same command continues a killed run, and one with more values or ratios adds to the report.
    """
    from svdllm.cli.grid_run import run_and_report
    from svdllm.comparison import find_study, study

    name = options.pop("study_name")
    chosen, asked = find_study(name), read_names(values or "")
    shared, calibration = g.split(options)
    run_and_report(
        model,
        output,
        lambda settings, training: study(name, asked, method, settings, training, teacher=model),
        shared,
        calibration,
        chosen,
    )
