"""``svdllm eval``: perplexity, beside the dense model's."""

from __future__ import annotations

from typing import Annotated

import typer

from svdllm.cli import options as o
from svdllm.cli.console import ConsoleReporter, console, print_json
from svdllm.cli.tables import perplexity_table
from svdllm.data import check_source
from svdllm.errors import InputError
from svdllm.evaluate import evaluate_models


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    model: o.Model,
    ppl: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to measure perplexity on: python-docs, wikitext2, c4, ptb, a hub data set or a file; may be repeated.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The dense model, measured beside it.", show_default=False)] = None,
    seqlen: Annotated[int, typer.Option(help="Tokens of a window; windows do not overlap.")] = 2048,
    max_windows: Annotated[int | None, typer.Option(help="Only the first windows.", show_default="all")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows at once.", show_default="by seqlen")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto is float32 on a CPU, the model's own on a GPU.")] = "auto",
    offline: o.Offline = False,
    json: o.Json = False,
) -> None:
    """Measures perplexity: the whole text as one stream of tokens, cut into windows without overlap."""
    if not ppl:
        raise InputError("Nothing to measure: give a text with --ppl, say --ppl python-docs or --ppl my-text.txt.")
    if seqlen < 2 or (max_windows is not None and max_windows < 1) or (batch_size is not None and batch_size < 1):
        raise InputError("--seqlen must be at least 2, --max-windows and --batch-size at least 1.")
    for text in ppl:
        check_source(text)
    rows = evaluate_models(
        [model] if base is None else [model, base],
        ppl,
        seqlen=seqlen,
        max_windows=max_windows,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        offline=offline,
        reporter=ConsoleReporter(),
    )
    if json:
        print_json({"results": [row.to_dict() for row in rows]})
        return
    console.print(perplexity_table(rows))
