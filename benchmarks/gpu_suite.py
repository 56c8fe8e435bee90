"""Measures everything that needs a GPU, in order of worth, within given minutes; writes a JSON file and a page.

    python benchmarks/gpu_suite.py --minutes 8 --output DIR
    python benchmarks/gpu_suite.py --dry-run --output DIR        # every step on tiny shapes, on the CPU

Steps (``--steps`` names some of them):

- ``agreement``: tiny models of several families, compressed on the device and on the CPU in float32, compared by
  logits;
- ``compression``: a random model with the shapes of LLaMA-7B and few blocks, compressed by two presets;
- ``decomposition``: the spectra of one 7B block against the paper's path (Cholesky, inverse, SVD) on the same device;
- ``decode``: one step of the whole 7B at three ratios, replayed as a CUDA graph, against the dense model;
- ``inference``: prefill and decode without graphs, as ``svdllm bench`` measures them;
- ``latent``: bytes of the key-value cache and time of a step, with and without latents.

A step that fails is recorded with its message, and the others go on. Nothing is read but this package's sources.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

import svdllm
from decomposition import Linear, as_target, paper_factors, paper_root, squared_loss, summary
from gpu_page import page
from inference_gpu import llama_7b, random_models
from svdllm.cli.console import ConsoleReporter
from svdllm.common.device import resolve_device
from svdllm.compression.math.linalg import factorise, output_spectrum
from svdllm.compression.ranks.uniform import uniform_rank
from svdllm.compression.recipe_files import preset_settings
from svdllm.inference.bench import BenchSettings, benchmark_loaded
from svdllm.inference.bench.roofline import shape_of

Record = dict[str, Any]
PRESETS = ("paper", "balanced")


@dataclass(frozen=True)
class Suite:
    """The device, the shapes, and the moment at which the last step may begin."""

    device: torch.device
    tiny: bool
    blocks: int
    samples: int
    seqlen: int
    ends: float
    ratios: tuple[float, ...] = (0.2, 0.4, 0.6)
    repeats: int = 5
    done: dict[str, Record] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def config(self, num_blocks: int | None = None) -> LlamaConfig:
        config = llama_7b()
        if self.tiny:
            config.update({"vocab_size": 128, "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4})
            config.update({"num_key_value_heads": 4, "head_dim": 16, "num_hidden_layers": 2})
        elif num_blocks is not None:
            config.num_hidden_layers = num_blocks
        return config

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], Any], repeats: int | None = None) -> dict[str, float]:
        """Median and quartiles of the seconds of ``work``, after one call that is not counted."""
        work()
        times = []
        for _ in range(repeats or self.repeats):
            self.synchronise()
            started = time.perf_counter()
            work()
            self.synchronise()
            times.append(time.perf_counter() - started)
        return summary(times)


def random_model(config: LlamaConfig, suite: Suite) -> Any:
    torch.manual_seed(0)
    with torch.device(suite.device):
        return AutoModelForCausalLM.from_config(config, dtype=suite.dtype).eval()


def random_ids(suite: Suite, samples: int, seqlen: int) -> Tensor:
    vocab = suite.config().vocab_size
    return torch.randint(vocab, (samples, seqlen), generator=torch.Generator().manual_seed(0))


def agreement(suite: Suite) -> Record:
    """Largest difference of logits, over the largest logit, between checkpoints made on the device and on the CPU."""
    common = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "max_position_embeddings": 64}
    found: Record = {}
    ids = torch.randint(128, (16, 32), generator=torch.Generator().manual_seed(1))
    for family in ("llama", "qwen2", "qwen3", "gemma3_text")[: 1 if suite.tiny else None]:
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **common)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, settings in {
            "input": {"metric": "input", "allocation": "uniform"},
            "two-sided": {"metric": "two-sided", "allocation": "uniform", "gradient_samples": 8},
            "sequential": {"metric": "input", "allocation": "uniform", "calibration_mode": "sequential", "beta": 0.5},
        }.items():
            logits = [_logits_of_compressed(model, ids, device, settings) for device in ("cpu", str(suite.device))]
            found[f"{family}, {name}"] = float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())
    return {"relative_difference": found, "largest": max(found.values())}


@torch.no_grad()
def _logits_of_compressed(model: Any, ids: Tensor, device: str, settings: Record) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        recipe = svdllm.Recipe(ratio=0.3, samples=16, seqlen=32, round_to=1, device=device, **settings)
        svdllm.compress(model, recipe, Path(folder) / "out", calibration=ids)
        compressed = svdllm.load_model(Path(folder) / "out").to(device).eval()
        svdllm.fuse_factors(compressed)
        return compressed(input_ids=ids[:4].to(device)).logits.float().cpu()


def compression(suite: Suite) -> Record:
    """Seconds by stage of compressing a few blocks, what the plan said, and the sum for all blocks of the model."""
    all_blocks = llama_7b().num_hidden_layers
    found: Record = {"blocks": suite.blocks, "samples": suite.samples, "seqlen": suite.seqlen}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "dense"
        random_model(suite.config(suite.blocks), suite).save_pretrained(source)
        ids = random_ids(suite, suite.samples, suite.seqlen)
        for preset in PRESETS:
            settings = preset_settings(preset) | {"samples": suite.samples, "seqlen": suite.seqlen, "ratio": 0.2}
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
        rank = uniform_rank(as_target(Linear(name, out_features, in_features, name)), 0.2)
        full = min(out_features, in_features)

        def ours(weight: Tensor = weight_OI, gram: Tensor = gram_II, rank: int = rank, full: int = full):
            return factorise(weight, output_spectrum(weight, gram, full), rank)

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


@torch.no_grad()
def decode(suite: Suite) -> Record:
    """One decoding step at batch 1 and 8 after a short prompt: as it comes, and replayed as a CUDA graph."""
    found: Record = {}
    for name, model in random_models(suite.config(), list(suite.ratios), suite.dtype, suite.device, 0).items():
        svdllm.fuse_factors(model)
        bytes_read = shape_of(model).read_bytes
        for batch in (1, 8):
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


STEPS: dict[str, Callable[[Suite], Record]] = {
    "agreement": agreement,
    "compression": compression,
    "decode": decode,
    "decomposition": decomposition,
    "inference": inference,
    "latent": latent,
}


def run(suite: Suite, names: list[str]) -> Iterator[tuple[str, Record]]:
    """Each step with its record, until the time is over."""
    for name in names:
        if time.monotonic() > suite.ends:
            yield name, {"skipped": "the time was over"}
            continue
        print(f"== {name}", flush=True)
        started = time.monotonic()
        try:
            record = STEPS[name](suite)
        except Exception as error:
            traceback.print_exc()
            record = {"error": f"{type(error).__name__}: {error}"[:2000]}
        if suite.device.type == "cuda":
            torch.cuda.empty_cache()
        yield name, record | {"step_seconds": time.monotonic() - started}


def machine(device: torch.device) -> Record:
    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "svdllm": svdllm.__version__,
        "python": sys.version.split()[0],
    }


def main(arguments: list[str] | None = None) -> Record:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="no step begins after as many minutes")
    parser.add_argument("--output", type=Path, required=True, help="folder for gpu_suite.json and gpu_suite.md")
    parser.add_argument("--steps", default=",".join(STEPS), help="names of the steps, in order")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the model that is compressed")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--dry-run", action="store_true", help="every step on tiny shapes, on the CPU")
    args = parser.parse_args(arguments)
    names = args.steps.split(",")
    if unknown := [name for name in names if name not in STEPS]:
        parser.error(f"unknown steps {', '.join(unknown)}; there are {', '.join(STEPS)}")
    if not (args.dry_run or torch.cuda.is_available()):
        parser.exit(message="There is no GPU here. --dry-run tries every step on tiny shapes, on the CPU.\n")
    tiny = args.dry_run
    suite = Suite(
        device=resolve_device("cpu" if tiny else "cuda"),
        tiny=tiny,
        blocks=2 if tiny else args.blocks,
        samples=8 if tiny else args.samples,
        seqlen=32 if tiny else args.seqlen,
        ends=time.monotonic() + 60 * args.minutes,
        repeats=1 if tiny else 5,
    )
    args.output.mkdir(parents=True, exist_ok=True)
    record: Record = {"machine": machine(suite.device), "minutes": args.minutes, "steps": {}}
    for name, found in run(suite, names):
        record["steps"][name] = found
        (args.output / "gpu_suite.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        (args.output / "gpu_suite.md").write_text(page(record), encoding="utf-8")
        print(json.dumps({name: found if name not in ("inference", "latent") else "see the file"}), flush=True)
    return record


if __name__ == "__main__":
    main()
