"""``svdllm serve``: a model behind an OpenAI-compatible interface."""

from __future__ import annotations

from typing import Annotated

import typer

from svdllm.cli import options as o
from svdllm.cli.console import ConsoleReporter, error_console, print_warning
from svdllm.common.settings import DEVICE

Served = Annotated[str, typer.Argument(help="Hub id or local folder, compressed or not.", show_default=False)]
VllmOptions = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="-- [VLLM OPTIONS]",
        help="Options of vLLM, as in: -- --tensor-parallel-size 2 --max-model-len 4096",
        show_default=False,
    ),
]
Host = Annotated[str, o.option("Address to listen on; 0.0.0.0 is open to the network.", None, True)]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")]
Backend = Annotated[
    str,
    o.option(
        "vllm, transformers, or auto: vLLM if it is installed, unless --device or --kv-cache is given.", None, True
    ),
]
Device = Annotated[str, o.option(f"{DEVICE} (transformers only)", o.MACHINE, True)]
Dtype = Annotated[
    str,
    o.option(
        "What is computed in: auto is float32 on a CPU, the model's own dtype on a GPU; with vLLM, what vLLM chooses.",
        o.MACHINE,
        True,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    o.option(
        "Let vLLM run code files of the folder that are not of this version of svdllm.",
        None,
        False,
        "--trust-remote-code",
    ),
]


def serve(
    model: Served,
    vllm_options: VllmOptions = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    backend: Backend = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    kv_cache: o.KvCache = "ordinary",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serves a model to clients of the OpenAI API: /v1/chat/completions, /v1/completions, /v1/models.

    Clients call it by the name given here. Ctrl-C stops it.
    """
    from svdllm.inference.serve import prepare_service

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
