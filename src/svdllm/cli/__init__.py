"""The command line: each command parses, calls the library and prints."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from typing import Annotated

import typer

from svdllm.cli import (
    ablate,
    bench,
    chat,
    compare,
    compress,
    demo,
    evaluate,
    export,
    inspect,
    plan,
    prune,
    quantize,
    recover,
    serve,
    slicing,
    verify,
)
from svdllm.cli.commands import STYLE, group_of
from svdllm.cli.console import error_console
from svdllm.cli.renamed import renamed_flag
from svdllm.cli.terminal import lenient_streams
from svdllm.common.errors import SvdllmError, as_ours
from svdllm.common.processes import is_first
from svdllm.common.version import __version__

# ClickException, of the click that typer uses: newer versions carry their own.
UsageProblem: type[Exception] = typer.BadParameter.mro()[2]
COMMANDS = {
    "plan": plan.plan,
    "compress": compress.compress,
    "slice": slicing.slice_,
    "prune": prune.prune_,
    "recover": recover.recover_,
    "quantize": quantize.quantize_,
    "eval": evaluate.evaluate,
    "bench": bench.bench,
    "compare": compare.compare,
    "ablate": ablate.ablate,
    "inspect": inspect.inspect,
    "verify": verify.verify,
    "export": export.export,
    "serve": serve.serve,
    "chat": chat.chat,
    "demo": demo.demo,
}
# Where the same command continues after it was interrupted.
CONTINUES = {
    "compress": "finished block",
    "compare": "finished model",
    "ablate": "finished model",
    "recover": "saved step",
}

# Commands that torchrun and accelerate launch may start in several processes, which then tell each other of errors.
SHARED = (["compress"],)

app = typer.Typer(name="svdllm", no_args_is_help=True, pretty_exceptions_enable=False, cls=group_of(COMMANDS), **STYLE)


def _versions(asked: bool) -> None:
    if asked:
        typer.echo(f"svdllm {__version__}")
        for library in ("torch", "transformers"):
            typer.echo(f"{library} {metadata.version(library)}")
        raise typer.Exit


@app.callback(
    epilog="Exit codes: 0 done, 2 bad input, 3 unsupported model, 4 out of memory or disk, 5 NaN or infinity, "
    "130 interrupted."
)
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_versions, is_eager=True, help="Show the versions and exit.")
    ] = False,
) -> None:
    """Makes a causal language model smaller by truncation-aware SVD (SVD-LLM, arXiv 2403.07378) of its linear layers.

    The result is an ordinary Hugging Face checkpoint.

    Start with [bold]svdllm demo[/bold], or see what a run would do: [bold]svdllm plan MODEL --ratio 0.2[/bold]
    """


def main(arguments: list[str] | None = None) -> None:
    """Entry point; a user's mistake ends with one message and its own exit code, never a traceback."""
    with lenient_streams():
        code = _run(sys.argv[1:] if arguments is None else arguments)
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    as_json = "--json" in arguments
    # of processes that share a run, one reports an error that all of them have
    is_silent = arguments[:1] in SHARED and not is_first()
    try:
        code = app(args=arguments, standalone_mode=False)
        sys.stdout.flush()  # a disk that is full is reported below
    except UsageProblem as error:
        if (renamed := renamed_flag(error)) is not None:
            return renamed.exit_code if is_silent else _show(renamed, as_json)
        if not is_silent:
            error.show()  # type: ignore[attr-defined]
        code = error.exit_code  # type: ignore[attr-defined]
    except (typer.Abort, KeyboardInterrupt):
        code = 130 if is_silent else _interrupted(arguments)
    except Exception as error:
        if (ours := as_ours(error)) is None:
            raise
        told = is_silent if ours.told is None else ours.told
        code = ours.exit_code if told else _show(ours, as_json)
    return code or 0


def _interrupted(arguments: list[str]) -> int:
    error_console.print("Interrupted.")
    if (last := CONTINUES.get(arguments[0] if arguments else "")) is not None:
        error_console.print(f"The same command continues after the last {last}.")
    return 130


def _show(error: SvdllmError, as_json: bool) -> int:
    if as_json:
        kind = type(error).__name__
        print(json.dumps({"error": {"type": kind, "message": str(error), "exit_code": error.exit_code}}))
    error_console.print("Error:", str(error), style="red", soft_wrap=True)
    return error.exit_code
