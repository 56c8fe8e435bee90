"""``svdllm serve``: a model behind an OpenAI-compatible interface."""

from __future__ import annotations

from typing import Annotated

import typer

from svdllm.cli import options as o
from svdllm.cli.console import ConsoleReporter, error_console, print_warning
from svdllm.inference.serve import prepare_service


def register(app: typer.Typer) -> None:
    app.command("serve")(serve)


def serve(
    model: Annotated[str, typer.Argument(help="Hub id or local folder, compressed or not.", show_default=False)],
    vllm_options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- [VLLM OPTIONS]",
            help="As in: -- --tensor-parallel-size 2 --max-model-len 4096",
            show_default=False,
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is open to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    backend: Annotated[
        str,
        typer.Option(
            help="vllm, transformers, or auto: vLLM where it is installed, unless --device or --kv-cache is given."
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ... (transformers)")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto is float32 on a CPU, the model's own on a GPU; with vLLM, what vLLM chooses.")
    ] = "auto",
    kv_cache: o.KvCache = "ordinary",
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Let vLLM run code files of the folder that are not of this version of svdllm."
        ),
    ] = False,
) -> None:
    """Serves a model to clients of the OpenAI API: /v1/chat/completions, /v1/completions, /v1/models.

    Clients call it by the name given here. Ctrl-C stops it.
    """
    service = prepare_service(
        model,
        host=host,
        port=port,
        device=device,
        dtype=dtype,
        backend=backend,
        kv_cache=kv_cache,
        trust_remote_code=trust_remote_code,
        vllm_options=tuple(vllm_options or ()),
    )
    if not service.has_chat_template:
        print_warning(f"{model} has no chat template: only /v1/completions will answer.")
    error_console.print(
        f"Serving {model} by {service.backend} at {service.url}, once it is loaded. Ctrl-C stops it.", soft_wrap=True
    )
    try:
        service.run(ConsoleReporter())
    except KeyboardInterrupt:
        error_console.print("Stopped.")
