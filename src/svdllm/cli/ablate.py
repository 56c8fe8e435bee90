"""``svdllm ablate``: what a method is sensitive to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdllm.cli import grid_options as g
from svdllm.cli import options as o
from svdllm.grid import STUDIES, study

DESCRIPTIONS = "; ".join(f"{name}: {chosen.summary}" for name, chosen in STUDIES.items())


def register(app: typer.Typer) -> None:
    app.command("ablate")(ablate)


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
    ratios: g.Ratios = "0.2",
    recover: g.Recover = None,
    title: Annotated[str | None, typer.Option(help="Of the report.", show_default="by model and study")] = None,
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
    new_tokens: g.NewTokens = 0,
    prompts: g.Prompts = None,
    device: g.Device = "auto",
    dtype: g.Dtype = "auto",
    keep: g.Keep = False,
    revision: o.Revision = None,
    offline: o.Offline = False,
    json: o.Json = False,
) -> None:
    """Varies one thing of a method, all else equal, and writes a report with a plot: the paper's sensitivity studies.

    [bold]svdllm ablate MODEL -o REPORT --study samples --values 16,64,256 --ratios 0.2,0.4[/bold]

    [bold]svdllm ablate MODEL -o REPORT --study order --recover 'data: alpaca.json'[/bold]

    The same command goes on with a killed run, and one with more values or ratios adds to the report.
    """
    calibration = g.calibration_settings(
        calibration=calib, samples=samples, seqlen=seqlen, seed=seed, device=device, dtype=dtype
    )
    variants = study(
        study_name,
        [] if values is None else g.names_of(values),
        method,
        calibration,
        g.recover_settings(recover),
        teacher=model,
    )
    grid = g.grid_of(
        model,
        variants,
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
        title or f"{Path(model).name}: {STUDIES[study_name].summary}",
        revision,
        offline,
    )
    g.run_and_report(grid, output, keep=keep, study=STUDIES[study_name], json=json)
