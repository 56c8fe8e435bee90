"""``svdllm compare``: methods side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdllm.cli import grid_options as g
from svdllm.cli import options as o
from svdllm.grid import variants_of


def register(app: typer.Typer) -> None:
    app.command("compare")(compare)


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
    ratios: g.Ratios = "0.2,0.4,0.6,0.8",
    recover: g.Recover = None,
    title: Annotated[str | None, typer.Option(help="Of the report.", show_default="by the model's name")] = None,
    calib: g.Calib = None,
    samples: g.Samples = None,
    seqlen: g.Seqlen = None,
    seed: g.Seed = None,
    ppl: g.Ppl = None,
    ppl_seqlen: g.PplSeqlen = 2048,
    ppl_windows: g.PplWindows = None,
    tasks: g.Tasks = None,
    task_data: g.TaskData = None,
    limit: g.Limit = None,
    num_fewshot: g.NumFewshot = None,
    prompts: g.Prompts = None,
    new_tokens: g.NewTokens = 48,
    device: g.Device = "auto",
    dtype: g.Dtype = "auto",
    keep: g.Keep = False,
    revision: o.Revision = None,
    offline: o.Offline = False,
    json: o.Json = False,
) -> None:
    """Compresses a model by several methods to several sizes, measures all of them, and writes a report.

    [bold]svdllm compare MODEL -o REPORT --methods svd,svd-llm,balanced --ratios 0.2,0.4 --ppl wikitext2 --tasks arc_easy,piqa[/bold]

    With training: [bold]--methods svd-llm,svd-llm+sequential-lora --recover 'data: alpaca.json'[/bold]

    Each method calibrates once for all ratios. Finished models are kept as records in REPORT/cells: the same command goes
    on with a killed run, and one with more methods or ratios adds to the report. A model that fails is in the report with
    its reason; the others go on.
    """
    calibration = g.calibration_settings(
        calibration=calib, samples=samples, seqlen=seqlen, seed=seed, device=device, dtype=dtype
    )
    grid = g.grid_of(
        model,
        variants_of(g.names_of(methods), calibration, g.recover_settings(recover), teacher=model),
        ratios,
        g.measures_of(
            ppl=ppl,
            seqlen=ppl_seqlen,
            windows=ppl_windows,
            tasks=tasks,
            task_data=task_data,
            limit=limit,
            num_fewshot=num_fewshot,
            prompts=prompts,
            new_tokens=new_tokens,
            device=device,
            dtype=dtype,
        ),
        title or f"{Path(model).name}: methods compared",
        revision,
        offline,
    )
    g.run_and_report(grid, output, keep=keep, study=None, json=json)
