"""``svdllm compare``: methods side by side."""

from __future__ import annotations

from inspect import Parameter
from typing import Annotated, Any

from svdllm.cli import grid_options as g
from svdllm.cli import options as o
from svdllm.cli.commands import takes
from svdllm.cli.readers import read_names

DEFAULT = "svd,fwsvd,asvd,svd-llm,balanced"


def method_options() -> list[Parameter]:
    """The option --methods, which lists the methods that there are."""
    from svdllm.comparison import SIMULATED_SYSTEMS, VARIANTS
    from svdllm.recovery.methods import METHODS

    option = o.option(
        f"Methods: {', '.join(VARIANTS)} (svd-llm as published, asvd-strs with its search for ranks), recipe files "
        "(.yaml), or NAME=MODEL for a model made elsewhere. With "
        f"{', '.join(f'+{name}' for name in METHODS)} behind it, a model is trained afterwards (see --recover). In few "
        f"bits, simulated: {', '.join(SIMULATED_SYSTEMS)}; gptq-2-g64 for groups of 64, svd-llm+quip-2 for factors in "
        "few bits.",
        None,
        True,
    )
    return [Parameter("methods", Parameter.KEYWORD_ONLY, default=DEFAULT, annotation=Annotated[str, option])]


@takes(g.shared_options(method_options, ratios="0.2,0.4,0.6,0.8", new_tokens=48))
def compare(model: o.Model, output: g.Output, **options: Any) -> None:
    """Compresses a model by several methods to several sizes, measures all of them, and writes a report.

    [bold]svdllm compare MODEL -o REPORT --methods svd,svd-llm,balanced --ratios 0.2,0.4 --ppl wikitext2[/bold]

    With training: [bold]--methods svd-llm,svd-llm+sequential-lora --recover 'data: alpaca.json'[/bold]

    Each method calibrates once for all ratios. Finished models are kept as records in REPORT/cells: the same command
    continues a killed run, and one with more methods or ratios adds to the report.

    A model that fails is in the report with its reason; the others go on.
    """
    from svdllm.cli.grid_run import run_and_report
    from svdllm.comparison import variants_of

    methods = read_names(options.pop("methods"))
    shared, calibration = g.split(options)
    run_and_report(
        model,
        output,
        lambda settings, training: variants_of(methods, settings, training, teacher=model, offline=shared.offline),
        shared,
        calibration,
    )
