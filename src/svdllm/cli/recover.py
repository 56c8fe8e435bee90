"""``svdllm recover``: a little training after compression."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdllm.cli import options as o
from svdllm.cli.console import ConsoleReporter, console, print_json, show
from svdllm.cli.options import option
from svdllm.cli.tables import recovery_table
from svdllm.recovery import make_recovery, recover
from svdllm.recovery.distributed import is_main

DATA, TRAINING, LORA, MEASURE = "Data", "Training", "Sequential LoRA", "Measuring"


def register(app: typer.Typer) -> None:
    app.command("recover")(recover_)


def recover_(
    folder: Annotated[Path, typer.Argument(help="A checkpoint made by svdllm.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to make.", show_default=False)],
    data: Annotated[
        str,
        option(
            "What to learn from: a .json, .jsonl or .parquet file or a hub data set with instruction/input/output, "
            "prompt/completion or messages; or text, as for --calib of svdllm compress.",
            DATA,
        ),
    ],
    method: Annotated[
        str,
        option(
            "sequential-lora (the paper's), blockwise (each block's output matched to the dense model's), distill (end "
            "to end on all factors); several, as in blockwise,distill, one after the other.",
            TRAINING,
            True,
        ),
    ] = "sequential-lora",
    teacher: Annotated[
        str | None,
        option(
            "The dense model. distill learns its predictions and the text (without: the text only); blockwise needs it.",
            TRAINING,
        ),
    ] = None,
    kl: Annotated[
        float | None,
        option(
            "Share of the divergence from the teacher in the loss; the rest is the text's (distill).", TRAINING, "0.5"
        ),
    ] = None,
    lr: Annotated[float | None, option("Highest learning rate.", TRAINING, "1e-4, distill 1.5e-4")] = None,
    epochs: Annotated[float | None, option("Passes over the examples.", TRAINING, "1, blockwise 4")] = None,
    samples: Annotated[
        int | None, option("Windows of text that blocks are trained on (blockwise).", DATA, "64")
    ] = None,
    steps: Annotated[
        int | None, option("Optimizer steps of each stage, instead of epochs.", TRAINING, "distill 400")
    ] = None,
    batch: Annotated[int | None, option("Sequences of a step.", TRAINING, "64, blockwise 4, distill 2")] = None,
    micro_batch: Annotated[
        int | None, option("Sequences in memory at once; the gradients of a step add up.", TRAINING, "4")
    ] = None,
    warmup: Annotated[
        float | None, option("Share of the steps in which the rate rises; then it falls as a cosine.", TRAINING, "0.05")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, option("Less memory, about a third more work.", TRAINING, False, "--gradient-checkpointing")
    ] = None,
    train_norms: Annotated[
        bool | None, option("Train the norms too (distill).", TRAINING, False, "--train-norms")
    ] = None,
    seed: Annotated[int | None, option("Of windows, order and adapters.", TRAINING, "3")] = None,
    device: Annotated[str | None, option("auto, cpu or cuda.", TRAINING, "auto")] = None,
    dtype: Annotated[
        str | None,
        option(
            "Of the products: float32, bfloat16 or float16; sums are in float32.", TRAINING, "auto: bfloat16 on a GPU"
        ),
    ] = None,
    seqlen: Annotated[
        int | None, option("Longest sequence, in tokens.", DATA, "256, blockwise 512; at most the model's context")
    ] = None,
    template: Annotated[
        str | None, option("How instructions are put: alpaca, or chat (the tokenizer's).", DATA, "alpaca")
    ] = None,
    train_on: Annotated[
        str | None, option("completions (only the answers) or everything.", DATA, "completions")
    ] = None,
    packing: Annotated[
        bool | None, option("Examples one after the other, in rows of full length.", DATA, False, "--packing")
    ] = None,
    order: Annotated[str | None, option("u-first, v-first, or joint (the paper's ablation).", LORA, "u-first")] = None,
    r: Annotated[int | None, option("Rank of the adapters.", LORA, "8", "--r")] = None,
    alpha: Annotated[float | None, option("Scale of the adapters: alpha / r.", LORA, "16")] = None,
    eval_data: Annotated[
        str | None, option("Held-out examples or text, whose loss is taken while it trains.", MEASURE)
    ] = None,
    eval_samples: Annotated[int | None, option("Its first sequences.", MEASURE, "32")] = None,
    eval_steps: Annotated[int | None, option("Steps between two looks at it.", MEASURE, "a fifth of a stage")] = None,
    log_dir: Annotated[Path | None, option("Folder for TensorBoard logs.", MEASURE)] = None,
    ppl: Annotated[
        list[str] | None,
        option(
            "Text to measure perplexity on before and after; may be repeated, none for nothing.", MEASURE, "python-docs"
        ),
    ] = None,
    ppl_seqlen: Annotated[
        int | None, option("Tokens of a window of it.", MEASURE, "512, or the model's context if it is shorter")
    ] = None,
    ppl_windows: Annotated[int, option("Only the first windows of it.", MEASURE, True)] = 16,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with a killed run of the same settings, or start over.")
    ] = True,
    offline: o.Offline = False,
    json: o.Json = False,
) -> None:
    """Trains a compressed model a little, so that it gets back what compression lost; ranks and format stay.

    The paper's update: [bold]svdllm recover OUT -o OUT2 --data alpaca.json[/bold]

    Mostly better, from plain text: [bold]svdllm recover OUT -o OUT2 --data wikitext2 --method distill --teacher MODEL[/bold]

    A killed run is taken up by the same command. Several GPUs: torchrun --nproc-per-node N -m svdllm recover ...
    """
    flags = {
        "methods": tuple(name.strip() for name in method.split(",")),
        "data": data,
        "teacher": teacher,
        "kl": kl,
        "lr": lr,
        "epochs": epochs,
        "samples": samples,
        "steps": steps,
        "batch": batch,
        "micro_batch": micro_batch,
        "warmup": warmup,
        "gradient_checkpointing": gradient_checkpointing,
        "train_norms": train_norms,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "eval_data": eval_data,
        "eval_samples": eval_samples,
        "eval_steps": eval_steps,
        "seqlen": seqlen,
        "template": template,
        "train_on": train_on,
        "packing": packing,
        "order": order,
        "r": r,
        "alpha": alpha,
    }
    result = recover(
        folder,
        output,
        make_recovery({name: value for name, value in flags.items() if value is not None}),
        ppl=[text for text in ppl or ["python-docs"] if text != "none"],
        ppl_seqlen=ppl_seqlen,
        ppl_windows=ppl_windows,
        log_dir=log_dir,
        offline=offline,
        resume=resume,
        reporter=ConsoleReporter(),
    )
    if not is_main():
        return
    if json:
        print_json(result.to_dict())
        return
    show(recovery_table(result))
    console.print("Next:", style="bold")
    console.print(f"  svdllm inspect {output}", soft_wrap=True)
