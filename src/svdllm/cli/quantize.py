"""``svdllm quantize``: the factors in 8 or 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdllm.cli import options as o
from svdllm.cli.console import ConsoleReporter, console, print_json, show
from svdllm.cli.tables import quantization_table
from svdllm.export.quantize import quantize


def register(app: typer.Typer) -> None:
    app.command("quantize")(quantize_)


def quantize_(
    model: Annotated[
        str,
        typer.Argument(help="A checkpoint made by svdllm, or a dense model (folder or hub id).", show_default=False),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to make.", show_default=False)],
    bits: Annotated[
        int, typer.Option(help="8 (integers), or 4 (NVFP4: numbers of 4 bits and a scale of 8 for every 16).")
    ] = 8,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Inputs that share a scale, with 8 bits. A factor svd_u has as many inputs as the rank: where that is "
            "no multiple, its scale is per row.",
            show_default="a row",
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX",
            help="Linears that are left as they are; may be repeated. Embeddings and lm_head always are.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the weights are rounded: auto, cpu, cuda, ...")] = "auto",
    offline: o.Offline = False,
    revision: o.Revision = None,
    json: o.Json = False,
) -> None:
    """Stores the linears of a model in 8 or 4 bits (torchao), in a folder that [bold]from_pretrained[/bold] loads.

    Low rank first, few bits last: [bold]svdllm quantize OUT -o OUT8 --bits 8[/bold]

    For 4 bits, compress with [bold]--round-to 16[/bold]: a factor whose rank is no multiple of 16 gets 8 bits.
    """
    result = quantize(
        model,
        output,
        bits=bits,
        group_size=group_size,
        skip=skip or (),
        device=device,
        offline=offline,
        revision=revision,
        reporter=ConsoleReporter(),
    )
    if json:
        print_json(result.to_dict())
        return
    show(quantization_table(result))
    console.print("Next:", style="bold")
    console.print(f"  svdllm eval {output} --base {model} --ppl python-docs --seqlen 512", soft_wrap=True)
