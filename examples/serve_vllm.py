"""Serve a compressed model by stock vLLM, in which nothing of svdllm is installed, and compare it with transformers.

python examples/serve_vllm.py OUT --vllm VENV/bin/vllm --tensor-parallel 2 [any options of `vllm serve`]

Both continue the same prompts greedily in float32; every token has to be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import torch
from transformers import AutoTokenizer, GenerationConfig

import svdllm

PROMPTS = [
    "The capital of France is",
    "A list in Python is",
    "Once upon a time there was a",
    "Water boils at a temperature of",
    "The three laws of motion say that",
    "To bake bread you need",
    "def fibonacci(n):",
    "In the year 1969",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a compressed model")
    parser.add_argument("--vllm", default="vllm", help="the program, of an environment of its own")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of a prompt")
    settings, more = parser.parse_known_args()

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    expected = continued_by_transformers(settings.model, prompts, settings.tokens)
    found = continued_by_vllm(settings, more, prompts)

    for prompt, ours, theirs in zip(PROMPTS, expected, found, strict=True):
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        print(f"{same:>3} of {len(ours)} tokens  {tokenizer.decode(ours)!r:.60}  after {prompt!r}")
    return 0 if expected == found else 1


def continued_by_transformers(model_path: str, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    model = svdllm.load_model(model_path, dtype=torch.float32)
    # Of its own, so that nothing stops early and no penalty of the model's is applied.
    model.generation_config = GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return [model.generate(torch.tensor([ids]))[0, len(ids) :].tolist() for ids in prompts]


def continued_by_vllm(settings: argparse.Namespace, more: list[str], prompts: list[list[int]]) -> list[list[int]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [settings.vllm, "serve", settings.model, "--trust-remote-code", "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--tensor-parallel-size", str(settings.tensor_parallel)]
    command += ["--max-model-len", "512", "--generation-config", "vllm", *more]
    print(*command, flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    server = subprocess.Popen(command, env=environment)
    try:
        wait_until_ready(server, address)
        return [complete(address, settings.model, ids, settings.tokens) for ids in prompts]
    finally:
        server.terminate()
        server.wait()


def wait_until_ready(server: subprocess.Popen[bytes], address: str) -> None:
    while True:
        try:
            urllib.request.urlopen(f"{address}/health").close()
        except (urllib.error.URLError, ConnectionError):
            if server.poll() is not None:
                raise SystemExit("vLLM did not start; what it printed says why.") from None
            time.sleep(1)
        else:
            return


def complete(address: str, model: str, ids: list[int], tokens: int) -> list[int]:
    body = {"model": model, "prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(body | {"return_token_ids": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["token_ids"]


if __name__ == "__main__":
    sys.exit(main())
