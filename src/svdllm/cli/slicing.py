"""``svdllm slice``: a smaller size of an elastic checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdllm.cli import options as o
from svdllm.cli.console import ConsoleReporter, print_json, show, show_next
from svdllm.cli.readers import read_names
from svdllm.common.settings import DEVICE

Elastic = Annotated[
    Path, typer.Argument(help="Folder of a checkpoint made by svdllm compress --elastic.", show_default=False)
]
Ratio = Annotated[
    float,
    o.option(
        "Share of the parameters of the compressed linears that is removed from the dense model; at least the "
        "checkpoint's own."
    ),
]
Device = Annotated[str | None, o.option(DEVICE, o.MACHINE, "the recipe's")]


Forms = Annotated[
    str,
    o.option(
        "pair, or packed: the same factors without their superfluous parameters, so that ranks are larger at the same "
        "ratio, as far as the checkpoint has them."
    ),
]


def slice_(
    folder: Elastic,
    ratio: Ratio,
    output: o.Output,
    forms: Forms = "pair",
    device: Device = None,
    json: o.Json = False,
) -> None:
    """Writes a smaller size of an elastic checkpoint: in seconds, without the original model or calibration text.

    First, once: [bold]svdllm compress MODEL -o OUT --ratio 0.2 --elastic[/bold]

    Then, for any ratio from 0.2: [bold]svdllm slice OUT --ratio 0.4 -o OUT40[/bold]

    The weights are bit for bit those of [bold]svdllm compress MODEL --ratio 0.4 --forms pair[/bold] with the same
    options. With [bold]--forms packed[/bold] the pairs are packed.
    """
    from svdllm.cli.tables import result_table
    from svdllm.compression.slice import slice_checkpoint

    names = read_names(forms)
    result = slice_checkpoint(folder, ratio, output, forms=names, device=device, reporter=ConsoleReporter())
    if json:
        print_json(result.to_dict())
        return
    show(result_table(result))
    show_next(f"inspect {output}")
