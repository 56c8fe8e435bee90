"""Serves a model, compressed or not, by an OpenAI-compatible API: with vLLM where installed, else with transformers."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from svdllm.common.device import resolve_device, resolve_dtype
from svdllm.common.errors import CheckpointError, InputError, UnsupportedModelError, first_line
from svdllm.common.extras import require_extra
from svdllm.common.progress import Reporter
from svdllm.data.chat_template import has_chat_template
from svdllm.inference.prepare import check_kv_cache, prepare
from svdllm.models.companions import has_own_code
from svdllm.models.limits import guard_embeddings
from svdllm.models.linears import listing
from svdllm.models.low_rank import family_classes
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.open import Source, open_config
from svdllm.models.wrapped import is_wrapper

BACKENDS = ("auto", "vllm", "transformers")
TENSOR_PARALLEL_OPTIONS = ("--tensor-parallel-size", "--tensor_parallel_size", "-tp")
SERVER_PACKAGES = ("fastapi", "uvicorn", "openai")


@dataclass(frozen=True, kw_only=True)
class Service:
    """A server that can be started: its settings were checked, and nothing is loaded yet."""

    model: str
    backend: str
    host: str
    port: int
    device: str
    dtype: str
    kv_cache: str
    config: PreTrainedConfig
    has_chat_template: bool
    vllm_command: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/v1"

    def run(self, reporter: Reporter | None = None) -> None:
        """Serves until it is stopped. vLLM replaces this process.

        Raises:
            CheckpointError: the weights cannot be loaded.
            UnsupportedModelError: the model cannot keep latents in its cache.
        """
        if self.backend == "vllm":
            os.execv(self.vllm_command[0], self.vllm_command)
        else:
            _run_transformers(self, reporter or Reporter())


def prepare_service(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    kv_cache: str = "ordinary",
    trust_remote_code: bool = False,
    vllm_options: tuple[str, ...] = (),
) -> Service:
    """Checks everything that a server needs.

    Args:
        model: a folder or a hub id; clients call the model by this name.
        backend: ``vllm``, ``transformers``, or ``auto``: vLLM if its program is beside this Python or on the PATH,
            and neither ``device`` nor ``kv_cache`` is set.
        device: for transformers only; vLLM uses the device that it was built for.
        dtype: ``auto`` is float32 on a CPU, else the model's own; with vLLM, vLLM chooses.
        kv_cache: for transformers only: ordinary, latent or latent-values (``svdllm.inference.latent_cache``).
        trust_remote_code: let vLLM run code files of the folder that differ from those of this version of svdllm.
        vllm_options: further options of ``vllm serve``.

    Raises:
        InputError: no such model, tokenizer, backend or device; the port is taken; a package is missing.
        UnsupportedModelError: not a causal language model.
    """
    if backend not in BACKENDS:
        raise InputError(f"--backend {backend!r} is unknown; use {', '.join(BACKENDS)}.")
    check_kv_cache(kv_cache)
    if Path(model).is_file():
        raise InputError(f"{model} is a file; a server takes a model's folder or a hub id.")
    source = open_config(model)
    tokenizer = source.load_tokenizer()
    _require_free(host, port)
    program = vllm_program()
    not_for_vllm = _not_for_vllm(source, device, kv_cache)
    if backend == "auto":
        backend = "vllm" if program and not_for_vllm is None else "transformers"
    settings: dict[str, Any] = {"model": model, "backend": backend, "host": host, "port": port, "config": source.config}
    settings |= {"has_chat_template": has_chat_template(tokenizer), "kv_cache": kv_cache}
    if backend == "vllm":
        if not_for_vllm is not None:
            raise InputError(f"{not_for_vllm} Use --backend transformers.")
        _require_divisible(source, vllm_options)
        command = (_required(program), "serve", model, "--host", host, "--port", str(port), "--dtype", dtype)
        trust = ("--trust-remote-code",) if _runs_code(source, trust_remote_code) else ()
        return Service(**settings, device=device, dtype=dtype, vllm_command=(*command, *trust, *vllm_options))
    if vllm_options:
        raise InputError(f"{' '.join(vllm_options)}: options for vLLM, but the server is that of transformers.")
    for package in SERVER_PACKAGES:
        require_extra(package, "svdllm serve", extra="serve")
    if "@" in model:
        raise InputError(f"{model}: transformers takes what follows an @ for a revision. Give the folder another name.")
    computed_in = str(resolve_dtype(dtype, resolve_device(device), source.dtype)).removeprefix("torch.")
    return Service(**settings, device=device, dtype=computed_in)


def _not_for_vllm(source: Source, device: str, kv_cache: str) -> str | None:
    """Says why vLLM cannot serve with these settings, or returns None."""
    if device != "auto":
        return f"--device {device} is for transformers: vLLM runs on the device that it was built for."
    if kv_cache != "ordinary":
        return f"--kv-cache {kv_cache} is for transformers: vLLM keeps keys and values in pages of its own."
    if (info := LowRankInfo.of(source.config)) and is_wrapper(source.config):
        return f"{source.name} also reads images or sound, and vLLM has not been tried with low-rank models that do."
    if info and info.shared_factors:
        return f"{source.name} was made with --joint-kv, and vLLM needs a first factor for every linear in the files."
    return None


def _require_divisible(source: Source, vllm_options: Sequence[str]) -> None:
    """Raises InputError if packed linears would be divided among several processes."""
    info, processes = LowRankInfo.of(source.config), tensor_parallel_size(vllm_options)
    packed = [name for name, entry in info.forms.items() if entry["form"] == "packed"] if info else []
    if packed and processes > 1:
        raise InputError(
            f"{source.name} has {len(packed)} packed linears ({listing(packed, 2)}), and vLLM was asked for "
            f"{processes} processes: packed factors cannot be divided among processes. Serve it with one process, or "
            f"write a checkpoint of pairs: svdllm export {source.name} -o DIR --format pairs."
        )


def tensor_parallel_size(vllm_options: Sequence[str]) -> int:
    """The number of processes in options of ``vllm serve``; 1 if they have none."""
    words = [part for option in vllm_options for part in option.split("=", 1)]
    sizes = [value for word, value in pairwise(words) if word in TENSOR_PARALLEL_OPTIONS and value.isdigit()]
    return int(sizes[-1]) if sizes else 1


def vllm_program() -> str | None:
    """Finds the program ``vllm``: in this Python's environment, or else on the PATH."""
    beside = Path(sys.executable).with_name("vllm")
    return str(beside) if beside.is_file() else shutil.which("vllm")


def _required(program: str | None) -> str:
    if program is None:
        raise InputError(
            "--backend vllm needs the program vllm, which is neither beside this Python nor on the PATH: pip install "
            "vllm, in an environment of its own if its versions do not go with yours. Or use --backend transformers."
        )
    return program


def _require_free(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"Cannot listen on {host}, port {port} ({first_line(error)}). Choose others with --host and --port."
        ) from error


def _runs_code(source: Source, trusted: bool) -> bool:
    """Whether vLLM has to run the folder's code files.

    Raises:
        InputError: it has to, but they differ from ours and the user does not trust them.
    """
    if (info := LowRankInfo.of(source.config)) is None:
        return trusted
    files = family_classes(info.base_model_type).causal_lm.code_files()
    folder = source.folder or Path()
    ours = all(
        (folder / name).is_file() and (folder / name).read_text(encoding="utf-8") == text
        for name, text in files.items()
    )
    if has_own_code(folder) and not trusted:
        raise InputError(
            f"vLLM would run the code that {source.name} names for its tokenizer (auto_map in tokenizer_config.json), "
            "because it has to run the code of the model. Read it and give --trust-remote-code, or use --backend "
            "transformers, which runs neither."
        )
    if not ours and not trusted:
        raise InputError(
            f"vLLM would run {' and '.join(files)} of {source.name}, which are not those of this version of svdllm. "
            "Read them and give --trust-remote-code, or use --backend transformers, which runs no code of the folder."
        )
    return True


def _run_transformers(service: Service, reporter: Reporter) -> None:
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    if info := LowRankInfo.of(service.config):
        # The server looks up a model's class by its name in transformers, where classes of other packages are missing.
        causal_lm = family_classes(info.base_model_type).causal_lm
        setattr(vars(model_manager)["transformers"], causal_lm.__name__, causal_lm)
    # The server lists the models in the hub's cache, whichever it serves.
    listed = [{"id": service.model, "object": "model", "created": int(time.time()), "owned_by": "svdllm"}]

    class Manager(model_manager.ModelManager):
        @staticmethod
        def get_gen_models(cache_dir: str | None = None) -> list[dict[str, Any]]:
            return listed

        def _load_model(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
            model = super()._load_model(*args, **kwargs).eval()
            guard_embeddings(model)
            if layers := prepare(model, kv_cache=service.kv_cache, reporter=reporter).latent_layers:
                reporter.note(f"{layers} layers keep latents in their cache.")
            return model

    model_manager.ModelManager = Manager  # type: ignore[misc]
    try:
        Serve(service.model, host=service.host, port=service.port, device=service.device, dtype=service.dtype)
    except (ValueError, SafetensorError) as error:
        kind = CheckpointError if Path(service.model).is_dir() else UnsupportedModelError
        raise kind(f"{service.model} cannot be served: {error}") from error
