"""``svdllm compare``: methods side by side."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from svdllm.cli import grid_options as g
from svdllm.cli import options as o
from svdllm.comparison import variants_of


def register(app: typer.Typer) -> None:
    app.command("compare")(compare)


@g.sharing_options(ratios="0.2,0.4,0.6,0.8", new_tokens=48)
def compare(
    model: o.Model,
    output: g.Output,
    methods: Annotated[
        str,
        typer.Option(
            help="Methods: svd, fwsvd, asvd, asvd-strs (with its search for ranks), svd-llm (as published), balanced, best, or recipe files (.yaml). With "
            "+sequential-lora, +blockwise or +distill behind it, the model is trained afterwards (see --recover)."
        ),
    ] = "svd,fwsvd,asvd,svd-llm,balanced",
    **shared: Any,
) -> None:
    """Compresses a model by several methods to several sizes, measures all of them, and writes a report.

    [bold]svdllm compare MODEL -o REPORT --methods svd,svd-llm,balanced --ratios 0.2,0.4 --ppl wikitext2 --tasks arc_easy,piqa[/bold]

    With training: [bold]--methods svd-llm,svd-llm+sequential-lora --recover 'data: alpaca.json'[/bold]

    Each method calibrates once for all ratios. Finished models are kept as records in REPORT/cells: the same command goes
    on with a killed run, and one with more methods or ratios adds to the report. A model that fails is in the report with
    its reason; the others go on.
    """
    g.run_and_report(
        model,
        output,
        lambda calibration, recover: variants_of(g.names_of(methods), calibration, recover, teacher=model),
        **shared,
    )
