"""``svdllm eval``: perplexity and tasks, beside the dense model's."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from svdllm.cli import options as o
from svdllm.cli.console import ConsoleReporter, console, print_json, show
from svdllm.cli.options import option
from svdllm.common.errors import InputError

if TYPE_CHECKING:
    from svdllm.evaluation.side_by_side import ModelEvaluation

Base = Annotated[str | None, option("The dense model, measured beside it.")]
Ppl = Annotated[
    list[str] | None,
    option(
        "Texts to measure perplexity on, as in wikitext2,c4: python-docs, wikitext2, c4, ptb, a hub data set or a "
        "file; may be repeated.",
        "Perplexity",
    ),
]
Seqlen = Annotated[
    int | None, option("Tokens of a window.", "Perplexity", "2048, or the smallest context of the models")
]
Protocol = Annotated[
    str,
    option(
        "windows (the papers': no overlap, the remainder dropped) or rolling (lm-evaluation-harness's: every token is "
        "predicted once).",
        "Perplexity",
        True,
    ),
]
MaxWindows = Annotated[int | None, option("First windows that are measured.", "Perplexity", "all")]
Tasks = Annotated[
    list[str] | None, option("Tasks of lm-evaluation-harness, as in arc_easy,piqa; may be repeated.", "Tasks")
]
Limit = Annotated[int | None, option("First examples of every task that are measured.", "Tasks", "all")]
NumFewshot = Annotated[
    int | None, option("Examples shown before each question.", "Tasks", "what the task's definition says")
]
TaskData = Annotated[
    Path | None, option("Folder with the tasks' data, as in piqa.validation.jsonl, instead of the hub.", "Tasks")
]
Output = Annotated[
    Path | None,
    option(
        "Where to keep the results, the harness's JSON with them: a .json file, or a folder.",
        "Output",
        False,
        "-o",
        "--output",
    ),
]
BatchSize = Annotated[
    int | None, option("Windows, or requests of tasks, at once.", o.MACHINE, "windows by seqlen, 8 requests")
]


def evaluate(
    model: o.Model,
    base: Base = None,
    ppl: Ppl = None,
    seqlen: Seqlen = None,
    protocol: Protocol = "windows",
    max_windows: MaxWindows = None,
    tasks: Tasks = None,
    limit: Limit = None,
    num_fewshot: NumFewshot = None,
    task_data: TaskData = None,
    output: Output = None,
    batch_size: BatchSize = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    offline: o.Offline = False,
    json: o.Json = False,
) -> None:
    """Measures a model, compressed or not: perplexity on texts, and tasks of lm-evaluation-harness.

    [bold]svdllm eval OUT --base MODEL --ppl python-docs --seqlen 512 --tasks arc_easy,piqa[/bold]
    """
    from svdllm.data.specs import split_specs
    from svdllm.evaluation.side_by_side import evaluate_models
    from svdllm.evaluation.tasks import open_tasks

    texts = split_specs(ppl or [])
    names = [name.strip() for value in tasks or [] for name in value.split(",")]
    of_tasks = {"limit": limit, "num_fewshot": num_fewshot, "task_data": task_data}
    _check(texts, names, of_tasks, {"--seqlen": seqlen, "--max-windows": max_windows, "--batch-size": batch_size})
    models = [model] if base is None else [model, base]
    _check_places(models, output, offline)
    reporter = ConsoleReporter()
    opened = open_tasks(names, **of_tasks, offline=offline, reporter=reporter)
    with opened if names else nullcontext() as suite:
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
    _show(evaluations, output, perplexity=bool(texts), tasks=bool(names), json=json)


def _check(texts: list[str], tasks: list[str], of_tasks: dict[str, Any], counts: dict[str, int | None]) -> None:
    """Raises InputError for options that are wrong whatever the models are."""
    from svdllm.data.checks import check_source

    if not texts and not tasks:
        raise InputError(
            "Nothing to measure: give a text with --ppl, say --ppl python-docs or --ppl my-text.txt, or tasks with "
            "--tasks, say --tasks arc_easy,piqa."
        )
    for flag, value in counts.items():
        least = 2 if flag == "--seqlen" else 1
        if value is not None and value < least:
            raise InputError(f"{flag} must be at least {least}, found {value}.")
    for name, value in of_tasks.items():
        if value is not None and not tasks:
            raise InputError(f"--{name.replace('_', '-')} does nothing without --tasks.")
    for text in texts:
        check_source(text)


def _check_places(models: list[str], output: Path | None, offline: bool) -> None:
    """Raises an error for a taken output or a wrong name of a model, before any data is downloaded."""
    from svdllm.checkpoint.output import require_new
    from svdllm.models.open import open_config

    if output is not None:
        require_new(output)
    for name in models:
        open_config(name, offline=offline, allow_quantized=True)


def _show(
    evaluations: list[ModelEvaluation], output: Path | None, *, perplexity: bool, tasks: bool, json: bool
) -> None:
    """Keeps and shows the results; what was measured is shown even if it cannot be kept."""
    from svdllm.cli.tables import perplexity_table
    from svdllm.cli.task_tables import tasks_table
    from svdllm.evaluation.document import evaluation_document, store_evaluation
    from svdllm.evaluation.side_by_side import perplexity_rows

    document = evaluation_document(evaluations)
    try:
        if output is not None:
            store_evaluation(document, output)
    finally:
        if json:
            print_json(document)
        if perplexity and not json:
            console.print(perplexity_table(perplexity_rows(evaluations)))
        if tasks and not json:
            show(tasks_table(evaluations))
    if output is not None and not json:
        console.print(f"Kept in {output}", soft_wrap=True)
