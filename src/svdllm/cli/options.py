"""Options that several commands share and no settings model has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from svdllm.common.settings import DEVICE, Panel

MACHINE: Panel = "Machine"


def option(
    help: str, panel: Panel | None = None, default: str | bool = False, *names: str, min: int | None = None
) -> Any:
    """An option in a panel of the help; ``default`` says what holds without it (True: the value, False: nothing)."""
    return typer.Option(*names, help=help, show_default=default, rich_help_panel=panel, min=min)


Model = Annotated[str, typer.Argument(help="Hub id, local folder, or GGUF file.", show_default=False)]
Checkpoint = Annotated[Path, typer.Argument(help="Folder of a checkpoint made by svdllm.", show_default=False)]
Output = Annotated[Path, option("Folder to make.", None, False, "-o", "--output")]
Json = Annotated[bool, option("Print one JSON document instead of text.", None, False, "--json")]
Offline = Annotated[bool, option("Never ask the hub: use local files and its cache only.", None, False, "--offline")]
Revision = Annotated[str | None, option("Branch, tag or commit of a hub model.")]
Resume = Annotated[
    bool,
    option("Continue a killed run of the same settings, or start over.", None, "resume", "--resume/--no-resume"),
]
Device = Annotated[str, option(DEVICE, MACHINE, True)]
Dtype = Annotated[
    str,
    option("What is computed in: auto is float32 on a CPU, the model's own dtype on a GPU.", MACHINE, True),
]
KvCache = Annotated[
    str, option("Key-value cache: ordinary, latent (less memory; see docs/kv-cache.md) or latent-values.", None, True)
]
