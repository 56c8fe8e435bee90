"""``svdllm quantize``: the linears of a model in few bits."""

from __future__ import annotations

from typing import Annotated

import typer

from svdllm.cli import options as o
from svdllm.cli.console import ConsoleReporter, print_json, show, show_next
from svdllm.common.errors import InputError
from svdllm.common.run_options import RunOptions

Subject = Annotated[
    str, typer.Argument(help="A checkpoint made by svdllm, or a dense model (folder or hub id).", show_default=False)
]
Bits = Annotated[
    int,
    o.option(
        "8, 6, 5, 4, 3 or 2: integers. With --format torchao 8, or 4 (NVFP4: numbers of 4 bits and a scale of 8 bits "
        "for every 16).",
        None,
        True,
    ),
]
Calib = Annotated[
    str | None,
    o.option(
        "Text, as for compress, with whose Grams a dense model is rounded (GPTQ): compress with one form for all.",
        None,
        "round to nearest",
    ),
]
Samples = Annotated[int, o.option("Windows of the text (--calib).", None, True)]
Seqlen = Annotated[int, o.option("Tokens of a window (--calib).", None, True)]
GroupSize = Annotated[
    int | None,
    o.option(
        "Inputs that share a scale: 32, 64 or 128; with --format torchao any number, for 8 bits. A factor svd_u has as "
        "many inputs as the rank: what these numbers do not divide has a scale per row.",
        None,
        "64; of torchao a row",
    ),
]
FormatOption = Annotated[
    str,
    o.option(
        "compressed-tensors: small files, which transformers unpacks when it loads them, and vLLM runs as they are. "
        "torchao: packed in memory too, for its kernels of 8 bits, and of NVFP4 on Blackwell.",
        None,
        True,
    ),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX",
        help="Linears that are left as they are; may be repeated. Embeddings and lm_head always are.",
        show_default=False,
    ),
]


def quantize_(
    model: Subject,
    output: o.Output,
    bits: Bits = 8,
    group_size: GroupSize = None,
    skip: Skip = None,
    format: FormatOption = "compressed-tensors",
    calib: Calib = None,
    samples: Samples = 128,
    seqlen: Seqlen = 2048,
    device: o.Device = "auto",
    offline: o.Offline = False,
    revision: o.Revision = None,
    json: o.Json = False,
) -> None:
    """Stores the linears of a model in few bits, in a folder that [bold]from_pretrained[/bold] loads.

    Every linear gets the same number of bits. Compress first, quantise last:
    [bold]svdllm quantize OUT -o OUT8 --bits 8[/bold]

    A dense model is rounded better with a text: [bold]svdllm quantize MODEL -o OUT4 --bits 4 --calib wikitext2[/bold]

    With fewer bits where they matter least: [bold]svdllm compress MODEL -o OUT --target-size 105MB[/bold]
    """
    from svdllm.cli.quantization_tables import quantization_table
    from svdllm.cli.tables import result_table
    from svdllm.export.quantize import quantize

    if calib is not None:
        if format != "compressed-tensors":
            raise InputError(f"--calib and --format {format} do not go together: drop one of them.")
        from svdllm.export.quantize_calibrated import quantize_calibrated

        made = quantize_calibrated(
            model,
            output,
            bits=bits,
            group_size=group_size,
            skip=skip or (),
            calibration=calib,
            samples=samples,
            seqlen=seqlen,
            device=device,
            options=RunOptions.of(offline=offline, revision=revision, reporter=ConsoleReporter()),
        )
        print_json(made.to_dict()) if json else show(result_table(made))
        return
    result = quantize(
        model,
        output,
        bits=bits,
        group_size=group_size,
        skip=skip or (),
        format=format,
        device=device,
        offline=offline,
        revision=revision,
        reporter=ConsoleReporter(),
    )
    if json:
        print_json(result.to_dict())
        return
    show(quantization_table(result))
    show_next(f"eval {output} --base {model} --ppl python-docs --seqlen 512")
