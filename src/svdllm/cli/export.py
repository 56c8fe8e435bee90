"""``svdllm export``: other forms of a checkpoint."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from svdllm.cli import options as o
from svdllm.cli.console import console, print_json
from svdllm.export import export_dense


class Format(str, Enum):
    dense = "dense"


def register(app: typer.Typer) -> None:
    app.command("export")(export)


def export(
    folder: Annotated[Path, typer.Argument(help="A checkpoint made by svdllm.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to make.", show_default=False)],
    format: Annotated[
        Format, typer.Option(help="dense: the factors multiplied out, a plain model of the original architecture.")
    ] = Format.dense,
    json: o.Json = False,
) -> None:
    """Writes a plain model that loads everywhere, GGUF converters included, but is as large as the original."""
    export_dense(folder, output)
    if json:
        print_json({"output_dir": str(output), "format": format.value})
        return
    console.print(f"Wrote {output}: a plain model, as large as the original.", soft_wrap=True)
