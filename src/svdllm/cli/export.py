"""``svdllm export``: other forms of a checkpoint."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from svdllm.cli import options as o
from svdllm.cli.console import console, print_json
from svdllm.common.errors import InputError
from svdllm.export.dense import export_dense
from svdllm.export.padded_heads import export_padded


class Format(str, Enum):
    dense = "dense"
    onnx = "onnx"
    openvino = "openvino"
    padded = "padded"


def register(app: typer.Typer) -> None:
    app.command("export")(export)


def export(
    folder: Annotated[Path, typer.Argument(help="A checkpoint made by svdllm.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to make.", show_default=False)],
    format: Annotated[
        Format,
        typer.Option(
            help="dense: the factors multiplied out, a plain model of the original architecture. onnx, openvino: the "
            "pairs of factors as they are, in a float32 graph for ONNX Runtime or OpenVINO. padded: the same model with "
            "more heads, which do nothing, for tensor parallelism."
        ),
    ] = Format.dense,
    tensor_parallel: Annotated[
        int | None,
        typer.Option(min=2, help="Processes that share out the heads (padded).", show_default=False),
    ] = None,
    json: o.Json = False,
) -> None:
    """Writes another form of a checkpoint.

    dense loads everywhere, GGUF converters included, but is as large as the original. A graph is run beside the model
    on random tokens, in other numbers than it was traced with, and kept if the logits agree; so is a padded model.
    """
    if (format is Format.padded) != (tensor_parallel is not None):
        raise InputError(
            "--tensor-parallel and --format padded go together: the heads are padded for so many processes."
        )
    document: dict[str, Any] = {"output_dir": str(output), "format": format.value}
    if format is Format.dense:
        export_dense(folder, output)
        said = "a plain model, as large as the original."
    elif tensor_parallel is not None:
        padding = export_padded(folder, output, tensor_parallel)
        document |= {key: value._asdict() for key, value in (("before", padding.before), ("after", padding.after))}
        document |= {"largest_difference": padding.difference}
        said = (
            f"{padding.after.all} heads in place of {padding.before.all}, of keys and values {padding.after.kv} in place "
            f"of {padding.before.kv}; largest difference from the original {padding.difference:.1e} of the largest logit."
        )
    else:
        from svdllm.export.graphs import export_graph

        difference, cached = export_graph(folder, output, format.value)
        document |= {"largest_difference": difference, "past_key_values": cached}
        said = (
            f"a float32 graph {'with' if cached else 'without'} a key-value cache; largest difference from the model "
            f"{difference:.1e} of the largest logit."
        )
    if json:
        print_json(document)
        return
    console.print(f"Wrote {output}: {said}", soft_wrap=True)
