"""``svdllm bench``: speed and memory, beside the dense model's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdllm.cli import options as o
from svdllm.cli.bench_tables import show_benchmark
from svdllm.cli.console import ConsoleReporter, console, print_json
from svdllm.cli.options import option
from svdllm.common.errors import InputError
from svdllm.inference.bench import BenchSettings, benchmark
from svdllm.inference.bench.document import check_output, store_benchmark

WHAT, MACHINE = "What is measured", "Machine"


def register(app: typer.Typer) -> None:
    app.command("bench")(bench)


def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Compressed models, folders or hub ids; several are measured in turns.", show_default=False
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            help="The dense model, measured in the same run. Without it there are no speed-ups and no ideals.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[str, option("Sequences at once.", WHAT, True)] = "1,8,32",
    prompt: Annotated[
        str | None,
        option("Tokens of the prompt, with every batch size.", WHAT, "128,512, as far as the models can take them"),
    ] = None,
    gen: Annotated[int, option("Decode steps after it.", WHAT, True)] = 64,
    repeats: Annotated[int, option("Measured turns of every model.", WHAT, True)] = 5,
    warmup: Annotated[int, option("Turns before them that are not measured.", WHAT, True)] = 1,
    seed: Annotated[int, option("Seed of the random token ids.", WHAT, True)] = 0,
    fuse: Annotated[
        bool,
        option("Lay the factors out for speed (svdllm.fuse_factors).", WHAT, "fuse", "--fuse/--no-fuse"),
    ] = True,
    kv_cache: Annotated[
        str, option("Of the compressed models: ordinary, latent (docs/kv-cache.md) or latent-values.", WHAT, True)
    ] = "ordinary",
    compile: Annotated[bool, option("Compile all models with torch.compile.", WHAT, False, "--compile")] = False,
    output: Annotated[
        Path | None, option("Folder for bench.json and plots.", "Output", False, "-o", "--output")
    ] = None,
    device: Annotated[str, option("auto, cpu, cuda, cuda:1, ...", MACHINE, True)] = "auto",
    dtype: Annotated[
        str, option("Of all models: auto is float32 on a CPU, the model's own on a GPU.", MACHINE, True)
    ] = "auto",
    threads: Annotated[int | None, option("Threads of the processor.", MACHINE, "as torch has it")] = None,
    offline: o.Offline = False,
    json: o.Json = False,
) -> None:
    """Measures speed and memory of compressed models against the dense one, and against what is possible.

    [bold]svdllm bench OUT20 OUT40 --base MODEL --batch 1,8 --prompt 128,512[/bold]

    Prefill and decode are measured apart. All models are in memory together and take turns in every repeat. The ideal is
    what the shapes allow: of the linears alone, and of the whole model. How it is measured: docs/speed.md.
    """
    settings = BenchSettings(
        batch_sizes=_numbers(batch, "--batch"),
        prompts=None if prompt is None else _numbers(prompt, "--prompt"),
        gen=gen,
        repeats=repeats,
        warmup=warmup,
        fuse=fuse,
        kv_cache=kv_cache,
        compile=compile,
        seed=seed,
    )
    if output is not None:
        check_output(output)
    record = benchmark(
        models,
        base,
        settings,
        device=device,
        dtype=dtype,
        threads=threads,
        offline=offline,
        reporter=ConsoleReporter(),
    )
    try:
        if output is not None:
            store_benchmark(record, output)
    finally:  # what was measured is shown even if it cannot be kept
        if json:
            print_json(record.to_dict())
        else:
            show_benchmark(record)
    if output is not None and not json:
        console.print(f"Kept in {output}", soft_wrap=True)


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option} {text!r} is no list of numbers; write it as 1,8,32.") from None
