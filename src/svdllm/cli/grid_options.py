"""What compare and ablate share: options, the run with its report, and what is printed."""

from __future__ import annotations

import inspect
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
import yaml
from rich.table import Table

from svdllm.cli import options as o
from svdllm.cli.console import ConsoleReporter, console, print_json
from svdllm.cli.options import option
from svdllm.common.errors import InputError
from svdllm.comparison import Grid, Measures, Study, Variant, run_grid
from svdllm.comparison.report import GridReport, read_spectra_files, write_report
from svdllm.comparison.settings import PROMPTS
from svdllm.data.specs import split_specs
from svdllm.evaluation.side_by_side import SEQLEN
from svdllm.models.limits import context_length, within_context
from svdllm.models.model_names import short_name
from svdllm.models.open import open_config

Command = TypeVar("Command", bound=Callable[..., None])
REPORT_EVERY = 120  # seconds, while the grid is made
CALIBRATION, MEASURE, RUN = "Calibration", "Measuring", "Running"


Output = Annotated[
    Path, typer.Option("-o", "--output", help="Folder of the report; a killed run goes on in it.", show_default=False)
]
Ratios = Annotated[str, typer.Option(help="Shares of the linears' parameters to remove.")]
Recover = Annotated[
    str | None,
    typer.Option(
        help="Settings of the training of methods written with +, as YAML: 'data: alpaca.json, steps: 20', or a file. "
        "The names are those of svdllm recover --help.",
        show_default=False,
    ),
]
Title = Annotated[str | None, typer.Option(help="Of the report.", show_default="by the model's name")]
Calib = Annotated[str | None, option("Calibration text of all methods.", CALIBRATION, "wikitext2")]
Samples = Annotated[int | None, option("Calibration windows.", CALIBRATION, "256")]
Seqlen = Annotated[int | None, option("Tokens of a calibration window.", CALIBRATION, "2048")]
Seed = Annotated[int | None, option("Seed of the random windows.", CALIBRATION, "3")]
Ppl = Annotated[
    list[str] | None,
    option(
        "Texts to measure perplexity on, as in wikitext2,c4; may be repeated; none for nothing.", MEASURE, "python-docs"
    ),
]
PplSeqlen = Annotated[
    int | None, option("Tokens of a window of it.", MEASURE, "2048, or the model's context if it is shorter")
]
PplWindows = Annotated[int | None, option("Only the first windows of it.", MEASURE, "all")]
Tasks = Annotated[str | None, option("Tasks of lm-evaluation-harness, as in arc_easy,piqa.", MEASURE)]
TaskData = Annotated[Path | None, option("Folder with files of the tasks, instead of the hub.", MEASURE)]
Limit = Annotated[int | None, option("Only the first examples of every task.", MEASURE, "all")]
NumFewshot = Annotated[int | None, option("Examples shown to the model.", MEASURE, "the task's own")]
Prompts = Annotated[
    Path | None, option("Text file with a prompt in each line, for the report to show what is written.", MEASURE)
]
NewTokens = Annotated[int, option("Tokens to write after each prompt; 0 for no prompts.", MEASURE, True)]
Device = Annotated[str, option("auto, cpu, cuda, ...", RUN, True)]
Dtype = Annotated[str, option("What is computed in: auto is float32 on a CPU, the model's own on a GPU.", RUN, True)]
Keep = Annotated[bool, option("Keep every checkpoint, in OUTPUT/checkpoints.", RUN, False, "--keep")]


def recover_settings(text: str | None) -> dict[str, Any] | None:
    """The mapping of --recover, which is YAML or a file of it."""
    if text is None:
        return None
    try:
        file = Path(text)
        content = (
            file.read_text(encoding="utf-8") if file.suffix in (".yaml", ".yml") else "{" + text.strip(" {}") + "}"
        )
        settings = yaml.safe_load(content)
    except OSError as error:
        raise InputError(f"--recover {text}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"--recover {text!r} is no YAML mapping like 'data: alpaca.json, steps: 20'.") from error
    if not isinstance(settings, dict):
        raise InputError(f"--recover {text!r}: expected a mapping like 'data: alpaca.json, steps: 20'.")
    return settings


def different_ratios(text: str) -> tuple[float, ...]:
    ratios = o.ratios_of(text, "--ratios")
    if len(set(ratios)) < len(ratios):
        raise InputError(f"--ratios {text!r} names a ratio twice.")
    return ratios


def names_of(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def sharing_options(**defaults: Any) -> Callable[[Command], Command]:
    """Makes typer see the options of ``run_and_report``, with these defaults, where a command has ``**shared``."""

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True)
        shared = inspect.signature(run_and_report, eval_str=True).parameters.values()
        options = [option for option in shared if option.kind is option.KEYWORD_ONLY]
        command.__signature__ = own.replace(  # type: ignore[attr-defined]
            parameters=[
                *(parameter for parameter in own.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD),
                *(option.replace(default=defaults.get(option.name, option.default)) for option in options),
            ]
        )
        return command

    return decorate


def run_and_report(
    model: str,
    output: Path,
    variants: Callable[[dict[str, Any], dict[str, Any] | None], tuple[Variant, ...]],
    study: Study | None = None,
    *,
    ratios: Ratios,
    recover: Recover = None,
    title: Title = None,
    calib: Calib = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    seed: Seed = None,
    ppl: Ppl = None,
    ppl_seqlen: PplSeqlen = None,
    ppl_windows: PplWindows = None,
    tasks: Tasks = None,
    task_data: TaskData = None,
    limit: Limit = None,
    num_fewshot: NumFewshot = None,
    prompts: Prompts = None,
    new_tokens: NewTokens,
    device: Device = "auto",
    dtype: Dtype = "auto",
    keep: Keep = False,
    revision: o.Revision = None,
    offline: o.Offline = False,
    json: o.Json = False,
) -> None:
    """Makes and measures the grid, shows its table and leaves its report; ends with the first failure's exit code.

    ``variants`` are made of the settings of all calibration and of all training.
    """
    subject = "methods compared" if study is None else study.summary
    given = {"calibration": calib, "samples": samples, "seqlen": seqlen, "seed": seed, "device": device, "dtype": dtype}
    # auto is what recipes have where they say nothing
    calibration = {name: value for name, value in given.items() if value not in (None, "auto")}
    config = open_config(model, offline=offline, revision=revision).config
    grid = Grid(
        model=model,
        variants=variants(calibration, recover_settings(recover)),
        ratios=different_ratios(ratios),
        measures=measures_of(
            ppl=ppl,
            seqlen=within_context(config, SEQLEN) if ppl_seqlen is None else ppl_seqlen,
            windows=ppl_windows,
            tasks=tasks,
            task_data=task_data,
            limit=limit,
            num_fewshot=num_fewshot,
            prompts=prompts,
            new_tokens=new_tokens,
            device=device,
            dtype=dtype,
        ),
        title=title or f"{short_name(model)}: {subject}",
        revision=revision,
        offline=offline,
    ).within(context_length(config))
    report = _reported(grid, output, keep, study)
    if json:
        print_json(report.to_dict())
    else:
        console.print(_table(report))
        for record in report.failed:
            console.print(f"{record['name']} failed: {record['error']['message']}", style="red", soft_wrap=True)
        console.print(f"Report: {output / 'report.html'}", soft_wrap=True)
    if report.failed:
        raise typer.Exit(report.failed[0]["error"]["exit_code"])


def _reported(grid: Grid, output: Path, keep: bool, study: Study | None) -> GridReport:
    """Runs a grid; its report is written now and then, and when it ends, however it ends."""
    command = shlex.join(["svdllm", *sys.argv[1:]])
    records: list[dict[str, Any]] = []
    written = time.monotonic()

    def write() -> GridReport:
        spectra = read_spectra_files(output)
        report = GridReport(grid=grid, records=records, spectra=spectra, command=command, study=study)
        write_report(report, output)
        return report

    def on_cell(found: list[dict[str, Any]]) -> None:
        nonlocal records, written
        records = found
        if time.monotonic() - written > REPORT_EVERY:
            write()
            written = time.monotonic()

    try:
        records = run_grid(grid, output, keep=keep, reporter=ConsoleReporter(), on_cell=on_cell)
    finally:
        report = write() if records else None
    assert report is not None
    return report


def measures_of(
    *,
    ppl: Sequence[str] | None,
    seqlen: int,
    windows: int | None,
    tasks: str | None,
    task_data: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    prompts: Path | None,
    new_tokens: int,
    device: str,
    dtype: str,
) -> Measures:
    if seqlen < 2 or (windows is not None and windows < 1) or new_tokens < 0:
        raise InputError("--ppl-seqlen must be at least 2, --ppl-windows at least 1, --new-tokens at least 0.")
    if tasks is None and (task_data, limit, num_fewshot) != (None, None, None):
        raise InputError("--task-data, --limit and --num-fewshot do nothing without --tasks.")
    if prompts is not None and not new_tokens:
        raise InputError("--prompts does nothing with --new-tokens 0: say how many tokens to write after each.")
    lines = PROMPTS if prompts is None else _prompts(prompts)
    measures = Measures(
        texts=tuple(text for text in split_specs(ppl or ["python-docs"]) if text != "none"),
        seqlen=seqlen,
        windows=windows,
        tasks=tuple(names_of(tasks or "")),
        task_data=task_data,
        limit=limit,
        num_fewshot=num_fewshot,
        prompts=lines if new_tokens else (),
        new_tokens=new_tokens,
        device=device,
        dtype=dtype,
    )
    if not (measures.texts or measures.tasks or measures.prompts):
        raise InputError("Nothing to measure: give --ppl, --tasks or prompts.")
    return measures


def _table(report: GridReport) -> Table:
    table = Table(header_style="bold", title=report.grid.title)
    for heading in ("ratio", "method", "files", *(column.heading for column in report.columns)):
        table.add_column(heading, justify="left" if heading in ("ratio", "method") else "right")
    for group in report.groups:
        for row in group.rows:
            cells = [f"{entry.text}{' *' if entry.best else ''}" for entry in row.entries] or ["failed"]
            table.add_row(group.title, row.method, row.size, *cells)
        table.add_section()
    table.caption = "* best of the ratio; standard errors are in the report"
    return table


def _prompts(file: Path) -> tuple[str, ...]:
    try:
        lines = tuple(line for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {file} cannot be read: {error}") from error
    if not lines:
        raise InputError(f"--prompts {file} holds no prompt: write one in each line.")
    return lines
