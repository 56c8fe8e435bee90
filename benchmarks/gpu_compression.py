"""The steps of ``gpu_suite.py`` that compress: agreement with the CPU, whole runs, and decompositions."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import svdllm
from decomposition import Linear, as_target, paper_factors, paper_root, squared_loss
from gpu_base import Record, Suite, llama_70b, random_ids, random_model
from inference_gpu import llama_7b
from svdllm.cli.console import ConsoleReporter
from svdllm.compression.math.linalg import factorise, output_spectrum
from svdllm.compression.ranks.uniform import uniform_rank
from svdllm.compression.recipe_files import preset_settings

PRESETS = ("paper", "balanced")
RECIPES: dict[str, Record] = {
    "input": {"metric": "input", "allocation": "uniform"},
    "two-sided": {"metric": "two-sided", "allocation": "uniform", "gradient_samples": 8},
    "sequential": {"metric": "input", "allocation": "uniform", "calibration_mode": "sequential", "beta": 0.5},
    "packed": {"metric": "input", "ranks": {"(q|o)_proj": {"packed": 24}, "(up|down)_proj": {"packed": 40}}},
    "few bits": {"metric": "input", "ranks": {"(q|o)_proj": {"int8": 32}, "(up|down)_proj": {"int4": 32}}},
}


def agreement(suite: Suite) -> Record:
    """Largest difference of logits, over the largest logit, between checkpoints made on the device and on the CPU."""
    common = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "max_position_embeddings": 64}
    found: Record = {}
    left_out: Record = {}
    ids = torch.randint(128, (16, 32), generator=torch.Generator().manual_seed(1))
    for family in ("llama", "qwen2", "qwen3", "gemma3_text")[: 1 if suite.tiny else None]:
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **common)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, settings in RECIPES.items():
            try:
                cpu, device = (_logits(model, ids, device, settings) for device in ("cpu", str(suite.device)))
            except ImportError as error:  # a form whose library is not installed here
                left_out[f"{family}, {name}"] = str(error)
                continue
            for kind, expected in cpu.items():
                difference = (expected - device[kind]).abs().max() / expected.abs().max()
                found[f"{family}, {name}, {kind}"] = float(difference)
    return {"relative_difference": found, "largest": max(found.values()), "left_out": left_out}


@torch.no_grad()
def _logits(model: Any, ids: Tensor, device: str, settings: Record) -> dict[str, Tensor]:
    """The logits of a compressed model: as loaded, with fused factors, and decoded with either cache."""
    with tempfile.TemporaryDirectory() as folder:
        size = {} if "ranks" in settings else {"ratio": 0.3}
        recipe = svdllm.Recipe(**size, samples=16, seqlen=32, round_to=1, device=device, **settings)
        svdllm.compress(model, recipe, Path(folder) / "out", calibration=ids)
        compressed: Any = svdllm.load_model(Path(folder) / "out")
        compressed.to(device).eval()
        ids = ids[:4].to(device)
        found = {"loaded": compressed(input_ids=ids).logits}
        svdllm.fuse_factors(compressed)
        found["fused"] = compressed(input_ids=ids).logits
        found["decoded"] = _decoded(compressed, ids)
        if svdllm.use_latent_cache(compressed):
            found["decoded with latents"] = _decoded(compressed, ids)
        return {kind: logits.float().cpu() for kind, logits in found.items()}


def _decoded(model: Any, ids: Tensor) -> Tensor:
    """The logits of all but the first half of the tokens, one by one with a cache."""
    half = ids.shape[1] // 2
    cache = model(input_ids=ids[:, :half], use_cache=True).past_key_values
    steps = [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(half, ids.shape[1])]
    return torch.cat(steps, 1)


def compression(suite: Suite) -> Record:
    """A few blocks of LLaMA-7B's shapes, with two presets."""
    return _compressions(suite, llama_7b, suite.blocks, suite.samples, PRESETS)


def compression_70b(suite: Suite) -> Record:
    """One block of Llama-3-70B's shapes, with the default preset and a quarter of the windows."""
    return _compressions(suite, llama_70b, 1, max(2, suite.samples // 4), PRESETS[-1:])


def _compressions(
    suite: Suite, like: Callable[[], LlamaConfig], blocks: int, samples: int, presets: Sequence[str]
) -> Record:
    """Seconds by stage of compressing a few blocks, what the plan said, and the sum for all blocks of the model."""
    all_blocks = like().num_hidden_layers
    found: Record = {"blocks": blocks, "all_blocks": all_blocks, "samples": samples, "seqlen": suite.seqlen}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "dense"
        random_model(suite.config(blocks, like), suite).save_pretrained(source)
        ids = random_ids(suite, samples, suite.seqlen)
        for preset in presets:
            settings = preset_settings(preset) | {"samples": samples, "seqlen": suite.seqlen, "ratio": 0.2}
            if suite.tiny:
                settings |= {"gradient_samples": 2}
            recipe = svdllm.Recipe(**settings, device=str(suite.device))
            plan = svdllm.plan(source, recipe)[0]
            started = time.perf_counter()
            result = svdllm.compress(source, recipe, Path(folder) / preset, calibration=ids, reporter=ConsoleReporter())
            seconds = time.perf_counter() - started
            found[preset] = {
                "seconds": seconds,
                "seconds_by_stage": result.seconds,
                "planned_seconds": plan.needs.seconds,
                "planned_seconds_range": plan.needs.seconds_range,
                "planned_seconds_by_stage": plan.needs.seconds_by_stage,
                "peak_ram_bytes": result.peak_ram_bytes,
                "planned_peak_ram_bytes": plan.peak_ram_bytes,
                "peak_device_bytes": result.peak_device_bytes,
                "planned_device_bytes": plan.needs.device_bytes,
                "seconds_of_all_blocks": seconds * all_blocks / len(result.plan.structure.blocks),
            }
    return found


def decomposition(suite: Suite) -> Record:
    """One block's spectra and factors, ours against the paper's path, each linear once per repeat."""
    config = suite.config()
    hidden, wide = config.hidden_size, config.intermediate_size
    shapes = {"q_proj": (hidden, hidden), "up_proj": (wide, hidden), "down_proj": (hidden, wide)}
    counts = {"q_proj": 4, "up_proj": 2, "down_proj": 1}
    generator = torch.Generator(suite.device).manual_seed(0)
    found: Record = {}
    totals = {"ours": 0.0, "paper": 0.0}
    for name, (out_features, in_features) in shapes.items():
        made = {"generator": generator, "device": suite.device}
        weight_OI = torch.randn(out_features, in_features, **made) / in_features**0.5
        inputs_TI = torch.randn(2 * in_features, in_features, **made) * torch.rand(in_features, **made)
        gram_II = (inputs_TI.T @ inputs_TI).double()
        target = as_target(Linear(name, out_features, in_features, name))
        rank, depth = uniform_rank(target, 0.2), target.break_even_rank

        def ours(weight: Tensor = weight_OI, gram: Tensor = gram_II, rank: int = rank, depth: int = depth):
            return factorise(weight, output_spectrum(weight, gram, depth, dtype=torch.float32), rank)

        def paper(weight: Tensor = weight_OI, gram: Tensor = gram_II, rank: int = rank):
            return paper_factors(weight, *paper_root(gram), rank)

        row: Record = {"shape": [out_features, in_features], "rank": rank}
        for path, work in (("ours", ours), ("paper", paper)):
            u_OR, v_RI = work()
            lost = squared_loss(weight_OI.double() - u_OR.double() @ v_RI.double(), gram_II)
            row[f"{path}_seconds"] = suite.seconds(work, 2)
            row[f"{path}_relative_loss"] = (lost / squared_loss(weight_OI.double(), gram_II)) ** 0.5
            totals[path] += counts[name] * row[f"{path}_seconds"]["median"]
        found[name] = row
    return {"linears": found, "seconds_of_a_block": totals, "speedup": totals["paper"] / totals["ours"]}
