"""The server: clients of the OpenAI API get what the model says; mistakes are found before anything is loaded."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

import svdllm
from mixed import mixed_model
from runs import run, save_dense, small_recipe
from svdllm.cli import main
from svdllm.common.errors import InputError
from svdllm.inference import serve as serving
from svdllm.inference.serve import prepare_service
from tokenizers_local import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MESSAGES = [{"role": "user", "content": "the fox"}]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Partly factored, with a chat template; says nothing but printable characters, each a token."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    dense = save_dense(folder / "dense", tokenizer=tokenizer)
    other = [i for i in range(300) if not (tokenizer.decode([i]).isascii() and tokenizer.decode([i]).isprintable())]
    GenerationConfig(suppress_tokens=[i for i in other if i != 1], eos_token_id=1).save_pretrained(dense)
    run(str(dense), folder / "small", recipe=small_recipe(ignore=["o_proj"]))
    return folder / "small"


def said_by_generate(folder: Path, messages: list[dict[str, str]], tokens: int) -> str:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), svdllm.load_model(folder)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=tokens, do_sample=False
    )
    return tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def server(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of ``svdllm serve`` in a process of its own, ready to answer."""
    with serving_process(small, tmp_path_factory.mktemp("log") / "server.txt", "--backend", "transformers") as port:
        yield port


@contextmanager
def serving_process(folder: Path, log: Path, *options: str) -> Iterator[int]:
    for package in serving.SERVER_PACKAGES:
        pytest.importorskip(package)
    port = free_port()
    command = [sys.executable, "-m", "svdllm", "serve", str(folder), "--port", str(port), *options]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            begun = time.monotonic()
            while not answers(port):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() - begun < 120, log.read_text()
                time.sleep(0.1)
            yield port
        finally:
            process.kill()
            process.wait()


def answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def test_chat_completions_are_those_of_generate(server: int, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from openai import OpenAI

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    client = OpenAI(base_url=f"http://127.0.0.1:{server}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list().data] == [str(small)]
    request: dict[str, Any] = {"model": str(small), "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    expected = said_by_generate(small, MESSAGES, 8)
    assert len(expected) > 2
    answer = client.chat.completions.create(**request)
    assert answer.choices[0].message.content == expected
    pieces = [chunk.choices[0].delta.content for chunk in client.chat.completions.create(**request, stream=True)]
    assert "".join(filter(None, pieces)) == expected
    assert len(list(filter(None, pieces))) > 1


def test_with_latents_in_the_cache_it_says_the_same(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openai import OpenAI

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving_process(small, tmp_path / "server.txt", "--kv-cache", "latent") as port:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        request: dict[str, Any] = {"model": str(small), "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
        answers = [client.chat.completions.create(**request).choices[0].message.content for _ in range(2)]
    assert answers == [said_by_generate(small, MESSAGES, 8)] * 2
    assert "2 layers keep latents in their cache" in (tmp_path / "server.txt").read_text()


def test_what_vllm_is_started_with(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, ...]] = []
    monkeypatch.setattr(serving, "vllm_program", lambda: "/opt/vllm")
    monkeypatch.setattr(os, "execv", lambda program, arguments: started.append(arguments))
    port = free_port()
    for model in (small, small.parent / "dense"):
        with pytest.raises(SystemExit) as done:
            main(["serve", str(model), "--port", str(port), "--dtype", "float32", "--", "--max-model-len", "64"])
        assert done.value.code == 0
    common = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    ours, dense = map(list, started)
    assert ours == ["/opt/vllm", "serve", str(small), *common, "--trust-remote-code", "--max-model-len", "64"]
    assert dense == ["/opt/vllm", "serve", str(small.parent / "dense"), *common, "--max-model-len", "64"]


def test_vllm_runs_code_that_is_ours_or_trusted(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "vllm_program", lambda: "/opt/vllm")
    altered = shutil.copytree(small, tmp_path / "altered")
    with (altered / "modeling_svdllm_llama.py").open("a") as file:
        file.write("print('hello')\n")
    with pytest.raises(InputError, match="not those of this version of svdllm"):
        prepare_service(str(altered), port=free_port())
    trusted = prepare_service(str(altered), port=free_port(), trust_remote_code=True)
    assert "--trust-remote-code" in trusted.vllm_command
    assert prepare_service(str(altered), port=free_port(), backend="transformers").vllm_command == ()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def test_vllm_is_taken_where_it_is(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "vllm_program", lambda: "/opt/vllm")
    assert prepare_service(str(small), port=free_port()).backend == "vllm"
    chosen = prepare_service(str(small), port=free_port(), device="cpu")
    assert (chosen.backend, chosen.dtype) == ("transformers", "float32")
    chosen = prepare_service(str(small), port=free_port(), kv_cache="latent-values")
    assert (chosen.backend, chosen.kv_cache) == ("transformers", "latent-values")
    joint = run(str(small.parent / "dense"), tmp_path / "joint", recipe=small_recipe(joint_kv=True)).output_dir
    assert prepare_service(str(joint), port=free_port()).backend == "transformers"
    with pytest.raises(InputError, match=r"made with --joint-kv, and vLLM needs .* Use --backend transformers"):
        prepare_service(str(joint), port=free_port(), backend="vllm")
    monkeypatch.setattr(serving, "vllm_program", lambda: None)
    assert prepare_service(str(small), port=free_port()).backend == "transformers"
    with pytest.raises(InputError, match="needs the program vllm, which is neither beside this Python nor on the PATH"):
        prepare_service(str(small), port=free_port(), backend="vllm")


def test_mistakes_are_found_before_anything_is_loaded(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "vllm_program", lambda: "/opt/vllm")
    dense, port = small.parent / "dense", free_port()
    bare = save_dense(tmp_path / "bare")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for message, model, settings in (
            ("--backend 'tgi' is unknown", dense, {"backend": "tgi"}),
            ("has no config.json", tmp_path, {}),
            ("is a file; a server takes", dense / "config.json", {}),
            ("has no tokenizer", bare, {}),
            ("Cannot listen on 127.0.0.1, port", dense, {"port": taken.getsockname()[1]}),
            ("Cannot listen on nowhere.invalid", dense, {"host": "nowhere.invalid"}),
            ("--device cpu is for transformers", dense, {"backend": "vllm", "device": "cpu"}),
            ("--device 'abacus' is not available", dense, {"device": "abacus"}),
            ("--kv-cache latent is for transformers: vLLM keeps", dense, {"backend": "vllm", "kv_cache": "latent"}),
            ("--kv-cache 'tiny' is unknown; use ordinary, latent", dense, {"kv_cache": "tiny"}),
            ("--dtype 'int3' is unknown", dense, {"backend": "transformers", "dtype": "int3"}),
            ("--quick: options for vLLM", dense, {"backend": "transformers", "vllm_options": ("--quick",)}),
        ):
            with pytest.raises(InputError, match=message):
                prepare_service(str(model), **{"port": port, **settings})
    monkeypatch.setattr("svdllm.common.extras.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"svdllm serve needs the package 'fastapi': pip install 'svdllm\[serve\]'"):
        prepare_service(str(dense), port=port, backend="transformers")


def test_damaged_weights_are_no_traceback(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in serving.SERVER_PACKAGES:
        pytest.importorskip(package)
    cut = shutil.copytree(small, tmp_path / "cut")
    os.truncate(cut / "model.safetensors", (cut / "model.safetensors").stat().st_size - 4)
    with pytest.raises(SystemExit) as done:
        main(["serve", str(cut), "--backend", "transformers", "--port", str(free_port())])
    assert done.value.code == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_a_model_without_a_template_is_warned_of(
    tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving, "vllm_program", lambda: "/opt/vllm")
    monkeypatch.setattr(os, "execv", lambda program, arguments: None)
    dense = save_dense(tmp_path / "dense", tokenizer=tokenizer)
    with pytest.raises(SystemExit):
        main(["serve", str(dense), "--port", str(free_port())])
    assert "has no chat template: only /v1/completions will answer" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "size"),
    [((), 1), (("--tensor-parallel-size", "2"), 2), (("--tensor-parallel-size=4", "--quick"), 4), (("-tp", "1"), 1)],
)
def test_packed_linears_are_not_divided_among_processes(
    options: tuple[str, ...], size: int, tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "vllm_program", lambda: "/opt/vllm")
    assert serving.tensor_parallel_size(options) == size
    mixed_model("llama", overrides={"vocab_size": 300}).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings: dict[str, Any] = {"backend": "vllm", "port": free_port(), "vllm_options": options}
    if size == 1:
        assert prepare_service(str(tmp_path), **settings).backend == "vllm"
        return
    with pytest.raises(InputError, match=rf"packed linears .* for {size} processes.*svdllm export .* --format pairs"):
        prepare_service(str(tmp_path), **settings)
