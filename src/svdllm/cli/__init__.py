"""The command line: each command parses, calls the library and prints."""

from __future__ import annotations

import json
import sys

import typer

from svdllm.cli import compress, demo, evaluate, export, inspect, plan, verify
from svdllm.cli.console import error_console
from svdllm.errors import SvdllmError

# ClickException, of the click that typer uses: newer versions carry their own.
UsageProblem: type[Exception] = typer.BadParameter.mro()[2]

app = typer.Typer(
    name="svdllm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Makes a causal language model smaller: truncation-aware SVD (SVD-LLM, arXiv 2403.07378) of its linear layers, "
        "written as an ordinary Hugging Face checkpoint.\n\n"
        "Start with [bold]svdllm demo[/bold], or [bold]svdllm plan MODEL --ratio 0.2[/bold] to see what a run would do."
    ),
    epilog="Exit codes: 0 done, 2 bad input, 3 unsupported model, 4 out of memory or disk, 5 NaN or infinity, 130 interrupted.",
)
for module in (plan, compress, evaluate, inspect, verify, export, demo):
    module.register(app)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; a user's mistake ends with one message and its own exit code, never a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _quiet_libraries()
    try:
        code = app(args=arguments, standalone_mode=False)
    except UsageProblem as error:
        error.show()  # type: ignore[attr-defined]
        code = error.exit_code  # type: ignore[attr-defined]
    except (typer.Abort, KeyboardInterrupt):
        code = _interrupted()
    except SvdllmError as error:
        _show(error, as_json="--json" in arguments)
        code = error.exit_code
    sys.exit(code or 0)


def _show(error: SvdllmError, *, as_json: bool) -> None:
    if as_json:
        kind = type(error).__name__
        print(json.dumps({"error": {"type": kind, "message": str(error), "exit_code": error.exit_code}}))
    error_console.print(f"[bold red]Error:[/bold red] {_plain(str(error))}", highlight=False, soft_wrap=True)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _interrupted() -> int:
    error_console.print("Interrupted. The same command goes on from the last finished block.")
    return 130


def _quiet_libraries() -> None:
    """Bars and remarks of the libraries below would tear ours apart; errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
