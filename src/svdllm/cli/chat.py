"""``svdllm chat``: a conversation in the terminal."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from svdllm.cli import options as o
from svdllm.cli.console import ConsoleReporter, error_console, print_warning
from svdllm.cli.terminal import reader_is_gone
from svdllm.common.errors import InputError

if TYPE_CHECKING:
    from svdllm.inference.chat import Chat


System = Annotated[str | None, o.option("What the model is told first.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")]
Temperature = Annotated[
    float | None,
    typer.Option(min=0, help="Temperature of sampling; 0 is greedy.", show_default="the model's own settings"),
]
Seed = Annotated[int | None, o.option("Seed of sampling.", None, "another one each time")]


def chat(
    model: o.Model,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = None,
    seed: Seed = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    kv_cache: o.KvCache = "ordinary",
    offline: o.Offline = False,
) -> None:
    """Talks with a model, compressed or not, by its chat template.

    Ctrl-C stops an answer, /reset begins anew, /exit ends. A file or pipe on standard input has one message in a line.
    """
    import torch

    from svdllm.checkpoint.load import load_model
    from svdllm.common.device import resolve_device, resolve_dtype
    from svdllm.data.chat_template import require_default_template
    from svdllm.inference.chat import Chat
    from svdllm.inference.prepare import check_kv_cache, prepare
    from svdllm.models.open import open_config

    check_kv_cache(kv_cache)
    place = resolve_device(device)
    source = open_config(model, offline=offline)
    tokenizer = source.load_tokenizer(offline)
    require_default_template(tokenizer)
    computed_in = resolve_dtype(dtype, place, source.dtype)
    if system is not None and not tokenizer.chat_template:
        raise InputError(f"{model} has no chat template, so --system has no place in what it is told.")
    loaded = load_model(model, dtype=computed_in, local_files_only=offline).to(place)  # type: ignore[arg-type]
    prepare(loaded.eval(), kv_cache=kv_cache, reporter=ConsoleReporter())
    conversation = Chat(loaded, tokenizer, system=system, max_new_tokens=max_new_tokens, temperature=temperature)
    if not conversation.has_template:
        print_warning(f"{model} has no chat template: each message is continued as plain text, by itself.")
    with nullcontext() if seed is None else torch.random.fork_rng():
        if seed is not None:
            torch.manual_seed(seed)
        _talk(conversation, interactive=sys.stdin.isatty())


def _talk(conversation: Chat, *, interactive: bool) -> None:
    if interactive:
        error_console.print("Ctrl-C stops an answer, /reset begins anew, /exit ends.")
    while not reader_is_gone():
        try:
            message = input("> " if interactive else "").strip()
        except UnicodeDecodeError as error:
            raise InputError(
                f"Standard input is not in {error.encoding}: {error.reason} at byte {error.start}."
            ) from error
        except EOFError:
            return
        except KeyboardInterrupt:
            error_console.print("\n/exit ends.")
            continue
        if message == "/exit":
            return
        if message == "/reset":
            conversation.reset()
        elif message:
            _answer(conversation, message, interactive=interactive)


def _answer(conversation: Chat, message: str, *, interactive: bool) -> None:
    try:
        for piece in conversation.answer(message):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        error_console.print(" (stopped)", end="")
    except InputError as error:
        if not interactive:
            raise
        print_warning(str(error))
    print(flush=True)
