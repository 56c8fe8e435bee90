"""``svdllm recover``: a little training after compression."""

from __future__ import annotations

from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

from svdllm.cli import options as o
from svdllm.cli.commands import takes
from svdllm.cli.console import ConsoleReporter, print_json, show, show_next
from svdllm.cli.generated import options_of, read_flags
from svdllm.cli.options import option

LogDir = Annotated[Path | None, option("Folder for TensorBoard logs.", "Measuring")]
Ppl = Annotated[
    list[str] | None,
    option(
        "Text to measure perplexity on before and after; may be repeated. none measures nothing.",
        "Measuring",
        "python-docs",
    ),
]
PplSeqlen = Annotated[
    int | None, option("Tokens of a perplexity window.", "Measuring", "512, or the model's context if it is shorter")
]
PplWindows = Annotated[int, option("First perplexity windows that are measured.", "Measuring", True)]


def recovery_options() -> list[Parameter]:
    """An option for every setting of a recovery."""
    from svdllm.recovery import Recovery

    return options_of(Recovery)


@takes(recovery_options)
def recover_(
    folder: o.Checkpoint,
    output: o.Output,
    log_dir: LogDir = None,
    ppl: Ppl = None,
    ppl_seqlen: PplSeqlen = None,
    ppl_windows: PplWindows = 16,
    resume: o.Resume = True,
    offline: o.Offline = False,
    json: o.Json = False,
    **settings: Any,
) -> None:
    """Trains a compressed model a little, so that it regains what compression lost; ranks and format stay.

    The paper's update: [bold]svdllm recover OUT -o OUT2 --data alpaca.json[/bold]

    Mostly better, from plain text:
    [bold]svdllm recover OUT -o OUT2 --data wikitext2 --method distill --teacher MODEL[/bold]

    A killed run is continued by the same command. Several GPUs: torchrun --nproc-per-node N -m svdllm recover ...
    """
    from svdllm.cli.tables import recovery_table
    from svdllm.common.processes import is_first
    from svdllm.recovery import Recovery, make_recovery, recover

    result = recover(
        folder,
        output,
        make_recovery(read_flags(Recovery, settings)),
        ppl=[text for text in ppl or ["python-docs"] if text != "none"],
        ppl_seqlen=ppl_seqlen,
        ppl_windows=ppl_windows,
        log_dir=log_dir,
        offline=offline,
        resume=resume,
        reporter=ConsoleReporter(),
    )
    if not is_first():
        return
    if json:
        print_json(result.to_dict())
        return
    show(recovery_table(result))
    show_next(f"inspect {output}")
