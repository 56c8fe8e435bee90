"""``svdllm bench``: speed and memory, beside the dense model's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svdllm.cli import options as o
from svdllm.cli.console import ConsoleReporter, console, print_json
from svdllm.cli.options import option
from svdllm.cli.readers import read_numbers

if TYPE_CHECKING:
    from svdllm.inference.bench import BenchmarkRecord

Models = Annotated[
    list[str],
    typer.Argument(help="Compressed models, folders or hub ids; several are measured in turns.", show_default=False),
]
Base = Annotated[
    str | None, option("The dense model, measured in the same run. Without it there are no speed-ups and no ideals.")
]
Batch = Annotated[str, option("Sequences at once.", "What is measured", True)]
Prompt = Annotated[
    str | None,
    option(
        "Tokens of the prompt, with every batch size.",
        "What is measured",
        "128,512, as far as the models can take them",
    ),
]
Gen = Annotated[int, option("Decode steps after the prompt.", "What is measured", True)]
Repeats = Annotated[int, option("Measured turns of every model.", "What is measured", True)]
Warmup = Annotated[int, option("Turns before them that are not measured.", "What is measured", True)]
Seed = Annotated[int, option("Seed of the random token ids.", "What is measured", True)]
Fuse = Annotated[
    bool, option("Lay the factors out for speed (svdllm.fuse_factors).", "What is measured", "fuse", "--fuse/--no-fuse")
]
KvCache = Annotated[
    str,
    option(
        "Cache of the compressed models: ordinary, latent (docs/kv-cache.md) or latent-values.",
        "What is measured",
        True,
    ),
]
Compile = Annotated[bool, option("Compile all models with torch.compile.", "What is measured", False, "--compile")]
Output = Annotated[Path | None, option("Folder for bench.json and plots.", "Output", False, "-o", "--output")]
Threads = Annotated[int | None, option("Threads of the processor.", o.MACHINE, "what torch takes")]


def bench(
    models: Models,
    base: Base = None,
    batch: Batch = "1,8,32",
    prompt: Prompt = None,
    gen: Gen = 64,
    repeats: Repeats = 5,
    warmup: Warmup = 1,
    seed: Seed = 0,
    fuse: Fuse = True,
    kv_cache: KvCache = "ordinary",
    compile: Compile = False,
    output: Output = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    threads: Threads = None,
    offline: o.Offline = False,
    json: o.Json = False,
) -> None:
    """Measures speed and memory of compressed models against the dense one, and against what is possible.

    [bold]svdllm bench OUT20 OUT40 --base MODEL --batch 1,8 --prompt 128,512[/bold]

    Prefill and decode are measured apart. All models are in memory together and take turns in every repeat.

    The ideal is what the shapes allow: of the linears alone, and of the whole model. Details: docs/speed.md.
    """
    from svdllm.inference.bench import BenchSettings, benchmark
    from svdllm.inference.bench.document import check_output

    settings = BenchSettings(
        batch_sizes=read_numbers(batch, "--batch"),
        prompts=None if prompt is None else read_numbers(prompt, "--prompt"),
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
    machine = {"device": device, "dtype": dtype, "threads": threads, "offline": offline}
    _show(benchmark(models, base, settings, **machine, reporter=ConsoleReporter()), output, json)


def _show(record: BenchmarkRecord, output: Path | None, json: bool) -> None:
    """Keeps and shows the measurements, which are shown even if they cannot be kept."""
    from svdllm.cli.bench_tables import show_benchmark
    from svdllm.inference.bench.document import store_benchmark

    try:
        if output is not None:
            store_benchmark(record, output)
    finally:
        if json:
            print_json(record.to_dict())
        else:
            show_benchmark(record)
    if output is not None and not json:
        console.print(f"Kept in {output}", soft_wrap=True)
