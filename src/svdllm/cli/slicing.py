"""``svdllm slice``: a smaller size of an elastic checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdllm.cli import options as o
from svdllm.cli.console import ConsoleReporter, console, print_json, show
from svdllm.cli.tables import result_table
from svdllm.compression.slice import slice_checkpoint


def register(app: typer.Typer) -> None:
    app.command("slice")(slice_)


def slice_(
    folder: Annotated[Path, typer.Argument(help="A checkpoint made by svdllm compress --elastic.", show_default=False)],
    ratio: Annotated[
        float,
        typer.Option(
            help="Share of the parameters of the compressed linears that is REMOVED, of the dense model's: at least the "
            "checkpoint's own.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to make.", show_default=False)],
    device: Annotated[
        str | None,
        typer.Option(help="Where the reference logits are computed: auto, cpu, cuda, ...", show_default="recipe's"),
    ] = None,
    json: o.Json = False,
) -> None:
    """Writes a smaller size of an elastic checkpoint: in seconds, without the original model or calibration text.

    First, once: [bold]svdllm compress MODEL -o OUT --ratio 0.2 --elastic[/bold]

    Then, for any ratio from 0.2: [bold]svdllm slice OUT --ratio 0.4 -o OUT40[/bold]

    The weights are bit for bit those of [bold]svdllm compress MODEL --ratio 0.4[/bold] with the same options.
    """
    result = slice_checkpoint(folder, ratio, output, device=device, reporter=ConsoleReporter())
    if json:
        print_json(result.to_dict())
        return
    show(result_table(result))
    console.print("Next:", style="bold")
    console.print(f"  svdllm inspect {output}", soft_wrap=True)
