"""The steps of ``gpu_suite.py`` that run models: decoding, prefill, caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

import svdllm
from gpu_base import Record, Skipped, Suite, random_ids
from inference_gpu import random_models
from svdllm.cli.console import ConsoleReporter
from svdllm.inference.bench import BenchSettings, benchmark_loaded
from svdllm.inference.bench.roofline import shape_of


@torch.no_grad()
def decode(suite: Suite) -> Record:
    """One decoding step at batch 1, 8 and 32 after a short prompt: as it comes, and replayed as a CUDA graph."""
    found: Record = {}
    for name, model in random_models(suite.config(), list(suite.ratios), suite.dtype, suite.device, 0).items():
        svdllm.fuse_factors(model)
        bytes_read = shape_of(model).read_bytes
        for batch in (1, 8, 32):
            step = _step(model, batch, suite)
            row: Record = {"weight_bytes": bytes_read, "eager": suite.seconds(step, 10)}
            if suite.device.type == "cuda":
                row["graph"] = suite.seconds(_captured(step), 20)
                row["bytes_per_second"] = bytes_read / row["graph"]["median"]
            found[f"{name}, batch {batch}"] = row
    for name, row in found.items():
        dense = found[f"dense, {name.rpartition(', ')[2]}"]
        for way in ("eager", "graph"):
            if way in row:
                row[f"{way}_speedup"] = dense[way]["median"] / row[way]["median"]
        row["ideal_speedup"] = dense["weight_bytes"] / row["weight_bytes"]
    return found


def _step(model: Any, batch: int, suite: Suite) -> Callable[[], Tensor]:
    """Computes the logits of one token after 128 others, always the same one, in a cache of fixed size."""
    context = 32 if suite.tiny else 128
    cache = StaticCache(config=model.config, max_cache_len=2 * context)
    ids = random_ids(suite, batch, context).to(suite.device)
    model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    token = ids[:, -1:].contiguous()
    positions = torch.full((batch, 1), context, device=suite.device)

    def step() -> Tensor:
        return model(input_ids=token, position_ids=positions, past_key_values=cache, logits_to_keep=1).logits

    return step


def _captured(step: Callable[[], Tensor]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def inference(suite: Suite) -> Record:
    """Prefill and decode of the whole model, without graphs, in turns."""
    batches, prompts, gen = ((1,), (8,), 4) if suite.tiny else ((1, 32), (128, 512), 32)
    settings = BenchSettings(batch_sizes=batches, prompts=prompts, gen=gen, repeats=suite.repeats, warmup=1)
    models = random_models(suite.config(), list(suite.ratios), suite.dtype, suite.device, 0)
    return benchmark_loaded(models, "dense", settings, reporter=ConsoleReporter()).to_dict()


def latent(suite: Suite) -> Record:
    """The same of the most compressed model, with latents in its cache, at a long context."""
    batches, prompts, gen = ((1,), (8,), 4) if suite.tiny else ((8,), (2048,), 16)
    found: Record = {}
    for kind in ("ordinary", "latent-values", "latent"):
        settings = BenchSettings(batch_sizes=batches, prompts=prompts, gen=gen, repeats=3, warmup=1, kv_cache=kind)
        models = random_models(suite.config(), [suite.ratios[-1]], suite.dtype, suite.device, 0)
        found[kind] = benchmark_loaded(models, "dense", settings, reporter=ConsoleReporter()).to_dict()
        del models
    return found


@torch.no_grad()
def compiled(suite: Suite) -> Record:
    """One decoding step at batch 1 through ``torch.compile(mode="reduce-overhead")``, dense and at the middle ratio."""
    if suite.device.type != "cuda":
        raise Skipped("CUDA graphs need a GPU")
    ratio = suite.ratios[len(suite.ratios) // 2]
    found: Record = {}
    for name, model in random_models(suite.config(), [ratio], suite.dtype, suite.device, 0).items():
        svdllm.fuse_factors(model)
        model.forward = torch.compile(model.forward, mode="reduce-overhead")
        found[name] = suite.seconds(_step(model, 1, suite), 20)
    return {"seconds": found, "speedup": found["dense"]["median"] / found[f"{ratio * 100:g} % removed"]["median"]}
