"""``svdllm verify``: is a checkpoint what was written?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdllm.checkpoint.verify import verify as verify_checkpoint
from svdllm.cli import options as o
from svdllm.cli.console import console, print_json


def register(app: typer.Typer) -> None:
    app.command("verify")(verify)


def verify(
    folder: Annotated[Path, typer.Argument(help="A checkpoint made by svdllm.", show_default=False)],
    device: Annotated[str, typer.Option(help="Where the logits are computed: auto, cpu, cuda, ...")] = "auto",
    json: o.Json = False,
) -> None:
    """Checks hashes, shapes, that every weight is finite, and that the logits are those stored when it was written."""
    checks = verify_checkpoint(folder, device)
    if json:
        print_json({"folder": str(folder), "ok": True, "checks": dict(checks)})
        return
    for name, found in checks:
        console.print(f"ok  {name:<8} {found}")
