"""The command line: each command parses, calls the library and prints."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
    quantize,
    recover,
    serve,
    slicing,
    verify,
)
from svdllm.cli.console import error_console, print_warning
from svdllm.cli.terminal import lenient_streams
from svdllm.common.errors import SvdllmError, as_ours
from svdllm.models.unused_tensors import UnusedTensorsWarning

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
for module in (
    plan,
    compress,
    slicing,
    recover,
    quantize,
    evaluate,
    bench,
    compare,
    ablate,
    inspect,
    verify,
    export,
    serve,
    chat,
    demo,
):
    module.register(app)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; a user's mistake ends with one message and its own exit code, never a traceback."""
    with lenient_streams():
        code = _run(sys.argv[1:] if arguments is None else arguments)
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    _quiet_libraries()
    try:
        with _warnings_in_our_words():
            code = app(args=arguments, standalone_mode=False)
        sys.stdout.flush()  # a disk that is full is told below
    except UsageProblem as error:
        error.show()  # type: ignore[attr-defined]
        code = error.exit_code  # type: ignore[attr-defined]
    except (typer.Abort, KeyboardInterrupt):
        error_console.print("Interrupted.")
        if arguments[:1] == ["compress"]:
            error_console.print("The same command goes on from the last finished block.")
        elif arguments[:1] in (["compare"], ["ablate"]):
            error_console.print("The same command goes on from the last finished model.")
        elif arguments[:1] == ["recover"]:
            error_console.print("The same command goes on from the last saved step.")
        code = 130
    except Exception as error:
        if (ours := as_ours(error)) is None:
            raise
        code = _show(ours, as_json="--json" in arguments)
    return code or 0


def _show(error: SvdllmError, *, as_json: bool) -> int:
    if as_json:
        kind = type(error).__name__
        print(json.dumps({"error": {"type": kind, "message": str(error), "exit_code": error.exit_code}}))
    error_console.print("Error:", str(error), style="red", soft_wrap=True)
    return error.exit_code


@contextmanager
def _warnings_in_our_words() -> Iterator[None]:
    """Shows warnings of this library as those of a run are shown; others stay as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", UnusedTensorsWarning)
        show_as_python = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, UnusedTensorsWarning):
                print_warning(str(message))
            else:
                show_as_python(message, category, *place, **more)

        warnings.showwarning = show
        yield


def _quiet_libraries() -> None:
    """Bars and remarks of the libraries below would tear ours apart; errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
