"""``svdllm eval``: perplexity and tasks, beside the dense model's."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from svdllm.checkpoint.output import require_new
from svdllm.cli import options as o
from svdllm.cli.console import ConsoleReporter, console, print_json, show
from svdllm.cli.options import option
from svdllm.cli.tables import perplexity_table
from svdllm.cli.task_tables import tasks_table
from svdllm.common.errors import InputError
from svdllm.data.checks import check_source
from svdllm.data.specs import split_specs
from svdllm.evaluation.document import evaluation_document, store_evaluation
from svdllm.evaluation.side_by_side import evaluate_models, perplexity_rows
from svdllm.evaluation.tasks import open_tasks
from svdllm.evaluation.windows import PROTOCOLS
from svdllm.models.open import open_config

PERPLEXITY, TASKS, MACHINE = "Perplexity", "Tasks", "Machine"


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    model: o.Model,
    base: Annotated[str | None, typer.Option(help="The dense model, measured beside it.", show_default=False)] = None,
    ppl: Annotated[
        list[str] | None,
        option(
            "Texts to measure perplexity on, as in wikitext2,c4: python-docs, wikitext2, c4, ptb, a hub data set or a "
            "file; may be repeated.",
            PERPLEXITY,
        ),
    ] = None,
    seqlen: Annotated[
        int | None, option("Tokens of a window.", PERPLEXITY, "2048, or the smallest context of the models")
    ] = None,
    protocol: Annotated[
        str,
        option(
            "windows (the papers': no overlap, the remainder dropped) or rolling (lm-evaluation-harness's: every token "
            "predicted once).",
            PERPLEXITY,
            True,
        ),
    ] = PROTOCOLS[0],
    max_windows: Annotated[int | None, option("Only the first windows.", PERPLEXITY, "all")] = None,
    tasks: Annotated[
        list[str] | None,
        option("Tasks of lm-evaluation-harness, as in arc_easy,piqa; may be repeated.", TASKS),
    ] = None,
    limit: Annotated[int | None, option("Only the first examples of every task.", TASKS, "all")] = None,
    num_fewshot: Annotated[
        int | None, option("Examples shown before each question.", TASKS, "what the task's definition says")
    ] = None,
    task_data: Annotated[
        Path | None,
        option("Folder with the tasks' data, as in piqa.validation.jsonl; the hub is not asked.", TASKS),
    ] = None,
    output: Annotated[
        Path | None,
        option(
            "Where to keep the results, the harness's JSON with them: a .json file, or a folder.",
            "Output",
            False,
            "-o",
            "--output",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, option("Windows, or requests of tasks, at once.", MACHINE, "windows by seqlen, 8 requests")
    ] = None,
    device: Annotated[str, option("auto, cpu, cuda, ...", MACHINE, True)] = "auto",
    dtype: Annotated[str, option("auto is float32 on a CPU, the model's own on a GPU.", MACHINE, True)] = "auto",
    offline: o.Offline = False,
    json: o.Json = False,
) -> None:
    """Measures a model, compressed or not: perplexity on texts, and tasks of lm-evaluation-harness."""
    texts = split_specs(ppl or [])
    task_names = [name.strip() for value in tasks or [] for name in value.split(",")]
    of_tasks = {"--limit": limit, "--num-fewshot": num_fewshot, "--task-data": task_data}
    _check(texts, task_names, seqlen, max_windows, batch_size, of_tasks)
    if output is not None:
        require_new(output)
    models = [model] if base is None else [model, base]
    for name in models:
        open_config(
            name, offline=offline, allow_quantized=True
        )  # a name that is wrong shall not cost a download of data
    reporter = ConsoleReporter()
    suite_of_tasks = open_tasks(
        task_names, limit=limit, num_fewshot=num_fewshot, task_data=task_data, offline=offline, reporter=reporter
    )
    with suite_of_tasks if task_names else nullcontext() as suite:
        evaluations = evaluate_models(
            models,
            texts,
            tasks=suite,
            seqlen=seqlen,
            protocol=protocol,
            max_windows=max_windows,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            offline=offline,
            reporter=reporter,
        )
    document = evaluation_document(evaluations)
    try:
        if output is not None:
            store_evaluation(document, output)
    finally:  # what was measured is shown even if it cannot be kept
        if json:
            print_json(document)
        if texts and not json:
            console.print(perplexity_table(perplexity_rows(evaluations)))
        if task_names and not json:
            show(tasks_table(evaluations))
    if output is not None and not json:
        console.print(f"Kept in {output}", soft_wrap=True)


def _check(
    texts: list[str],
    tasks: list[str],
    seqlen: int | None,
    max_windows: int | None,
    batch_size: int | None,
    of_tasks: dict[str, Any],
) -> None:
    if not texts and not tasks:
        raise InputError(
            "Nothing to measure: give a text with --ppl, say --ppl python-docs or --ppl my-text.txt, or tasks with "
            "--tasks, say --tasks arc_easy,piqa."
        )
    counts = ((seqlen, 2), (max_windows, 1), (batch_size, 1))
    if any(value is not None and value < least for value, least in counts):
        raise InputError("--seqlen must be at least 2, --max-windows and --batch-size at least 1.")
    for name, value in of_tasks.items():
        if value is not None and not tasks:
            raise InputError(f"{name} does nothing without --tasks.")
    for text in texts:
        check_source(text)
