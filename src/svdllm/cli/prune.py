"""``svdllm prune``: the pruning methods that low-rank factors are compared with."""

from __future__ import annotations

from inspect import Parameter
from typing import Any

from svdllm.cli import options as o
from svdllm.cli.commands import takes
from svdllm.cli.console import ConsoleReporter, print_json, show, show_next


def _options() -> list[Parameter]:
    from svdllm.cli.generated import options_of
    from svdllm.pruning.settings import Pruning

    return options_of(Pruning)


@takes(_options)
def prune_(
    model: o.Model,
    output: o.Output,
    revision: o.Revision = None,
    offline: o.Offline = False,
    json: o.Json = False,
    **settings: Any,
) -> None:
    """Removes heads, neurons, branches or directions by a published method, to compare with [bold]compress[/bold].

    [bold]svdllm prune MODEL -o OUT --method flap --ratio 0.2 --calib python-docs --samples 64 --seqlen 512[/bold]

    The result is a checkpoint that [bold]from_pretrained[/bold] loads. [bold]svdllm recover[/bold] trains it. A killed
    run begins anew.
    """
    from svdllm.cli.generated import read_flags
    from svdllm.cli.pruning_tables import pruning_table
    from svdllm.pruning.run import prune
    from svdllm.pruning.settings import Pruning, make_pruning

    chosen = make_pruning(read_flags(Pruning, settings))
    result = prune(model, chosen, output, offline=offline, revision=revision, reporter=ConsoleReporter())
    if json:
        print_json(result.to_dict())
        return
    show(pruning_table(result))
    show_next(f"eval {output} --base {model} --ppl python-docs --seqlen 512", f"inspect {output}")
