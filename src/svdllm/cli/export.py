"""``svdllm export``: other forms of a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from svdllm.cli import options as o
from svdllm.cli.console import console, print_json, size
from svdllm.common.errors import InputError


class Format(str, Enum):
    dense = "dense"
    pairs = "pairs"
    onnx = "onnx"
    openvino = "openvino"
    padded = "padded"
    gguf = "gguf"
    adapter = "adapter"
    modelopt = "modelopt"


FormatOption = Annotated[
    Format,
    typer.Option(
        help="dense: the factors multiplied out, a plain model of the original architecture. pairs: packed factors as "
        "pairs, for tensor parallelism and tools that want pairs. onnx, openvino: the factors as they are, in a "
        "float32 graph for ONNX Runtime or OpenVINO. padded: the same model with more heads, which do nothing, for "
        "tensor parallelism. gguf: a dense or quantised model without factors as one file for llama.cpp. "
        "adapter: corrections as an adapter of PEFT beside a plain model in few bits. modelopt: the same by the names "
        "of NVIDIA ModelOpt (svdquant_lora_a, svdquant_lora_b)."
    ),
]
TensorParallel = Annotated[
    int | None, typer.Option(min=2, help="Processes that share the heads (padded).", show_default=False)
]


def export(
    folder: o.Checkpoint,
    output: o.Output,
    format: FormatOption = Format.dense,
    tensor_parallel: TensorParallel = None,
    json: o.Json = False,
) -> None:
    """Writes another form of a checkpoint.

    dense loads everywhere, GGUF converters included, but is as large as the original. Only where every MLP is narrower,
    it is smaller.

    Pairs, a graph or a padded model are run beside the checkpoint on a few tokens and kept if the logits agree.
    """
    if (format is Format.padded) != (tensor_parallel is not None):
        raise InputError(
            "--tensor-parallel and --format padded go together: the heads are padded for so many processes."
        )
    if tensor_parallel is not None:
        found, said = _padded(folder, output, tensor_parallel)
    else:
        writers = {
            Format.dense: _dense,
            Format.pairs: _pairs,
            Format.gguf: _gguf,
            Format.adapter: _adapter,
            Format.modelopt: partial(_adapter, modelopt=True),
        }
        found, said = writers.get(format, partial(_graph, format=format))(folder, output)
    if json:
        print_json({"output_dir": str(output), "format": format.value} | found)
        return
    console.print(f"Wrote {output}: {said}", soft_wrap=True)


# Each of these exports, and returns what was found for --json and in words.


def _dense(folder: Path, output: Path) -> tuple[dict[str, Any], str]:
    from svdllm.export.dense import export_dense

    mlps = export_dense(folder, output)
    extent = "as large as the original" if mlps.width is None else f"whose MLPs have a width of {mlps.width}"
    zeros = f"; {mlps.filled_up} narrower MLPs are filled up with zeros" if mlps.filled_up else ""
    return {"mlp_width": mlps.width, "filled_up_mlps": mlps.filled_up}, f"a plain model, {extent}{zeros}."


def _pairs(folder: Path, output: Path) -> tuple[dict[str, Any], str]:
    from svdllm.export.pairs import export_pairs

    made = export_pairs(folder, output)
    dense = f", and {made.dense} dense matrices that are no larger than theirs" if made.dense else ""
    return asdict(made), (
        f"pairs of {made.pairs} packed linears{dense}; {size(made.bytes_after)} in place of {size(made.bytes_before)}; "
        f"largest difference from the original {made.difference:.1e} of the largest logit."
    )


def _adapter(folder: Path, output: Path, *, modelopt: bool = False) -> tuple[dict[str, Any], str]:
    from svdllm.export.adapter import MODELOPT, PEFT, export_adapter

    names = MODELOPT if modelopt else PEFT
    made = export_adapter(folder, output, names)
    return asdict(made), (
        f"base ({size(made.base_bytes)}) and {names.file} ({size(made.adapter_bytes)}), which corrects {made.linears} "
        f"linears by rank {made.rank} at most."
    )


def _gguf(folder: Path, output: Path) -> tuple[dict[str, Any], str]:
    from svdllm.export.gguf import export_gguf

    made = export_gguf(folder, output)
    types = ", ".join(f"{number} {kind}" for kind, number in made.types.items())
    return asdict(made), (
        f"{size(made.bytes)}, tensors: {types}; largest difference from the original {made.difference:.1e} of the "
        "largest logit."
    )


def _padded(folder: Path, output: Path, tensor_parallel: int) -> tuple[dict[str, Any], str]:
    from svdllm.export.padded_heads import export_padded

    padding = export_padded(folder, output, tensor_parallel)
    before, after = padding.before, padding.after
    found = {"before": before._asdict(), "after": after._asdict(), "largest_difference": padding.difference}
    return found, (
        f"{after.all} heads in place of {before.all}, and of keys and values {after.kv} in place of {before.kv}; "
        f"largest difference from the original {padding.difference:.1e} of the largest logit."
    )


def _graph(folder: Path, output: Path, *, format: Format) -> tuple[dict[str, Any], str]:
    from svdllm.export.graphs import export_graph

    difference, cached = export_graph(folder, output, format.value)
    return {"largest_difference": difference, "past_key_values": cached}, (
        f"a float32 graph {'with' if cached else 'without'} a key-value cache; largest difference from the model "
        f"{difference:.1e} of the largest logit."
    )
