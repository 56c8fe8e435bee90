"""Speed and memory of a dense model of random weights and of its low-rank twins, made on the device from shapes alone.

What ``svdllm bench`` measures, without any checkpoint: speed does not depend on the values of the weights. The shapes
are those of LLaMA-7B, or of a config.json; the ranks are those of the paper (uniform) in multiples of 8.

    python benchmarks/inference_gpu.py --ratios 0.2,0.4,0.6 --batch 1,32,128 --prompt 128,512 --output DIR
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from svdllm.cli.bench_tables import show_benchmark
from svdllm.cli.console import ConsoleReporter
from svdllm.common.device import resolve_device
from svdllm.compression.ranks.uniform import uniform_ranks
from svdllm.inference.bench import BenchmarkRecord, BenchSettings, benchmark_loaded
from svdllm.inference.bench.document import check_output, store_benchmark
from svdllm.models.config_files import load_config
from svdllm.models.discover import discover
from svdllm.models.low_rank import FORMAT_VERSION, low_rank_config
from svdllm.models.skeleton import build_skeleton

ROUND_TO = 8


def llama_7b() -> LlamaConfig:
    """The shapes of LLaMA-7B (arXiv 2302.13971), with the context of Llama 2."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


def twin_config(config: PreTrainedConfig, ratio: float) -> Any:
    """The low-rank config with ``ratio`` of the linears' parameters removed uniformly."""
    ranks = uniform_ranks(discover(build_skeleton(config)).targets, ratio, ROUND_TO)
    forms = {name: {"form": "pair", "rank": rank} for name, rank in ranks.items()}
    return low_rank_config(
        config, {"format_version": FORMAT_VERSION, "base_model_type": config.model_type, "forms": forms}
    )


def random_models(config: PreTrainedConfig, ratios: list[float], dtype: torch.dtype, device: torch.device, seed: int):
    """The dense model, named ``dense``, and a twin for each ratio, initialised on the device."""
    configs = {"dense": config} | {f"{ratio * 100:g} % removed": twin_config(config, ratio) for ratio in ratios}
    torch.manual_seed(seed)
    with torch.device(device):
        return {name: AutoModelForCausalLM.from_config(one, dtype=dtype).eval() for name, one in configs.items()}


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def main(arguments: list[str] | None = None) -> BenchmarkRecord:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="folder with a config.json instead of the shapes of LLaMA-7B")
    parser.add_argument("--ratios", default="0.2,0.4,0.6")
    parser.add_argument("--batch", type=numbers, default=(1, 8, 32))
    parser.add_argument("--prompt", type=numbers, default=(128, 512))
    parser.add_argument("--gen", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--no-fuse", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for bench.json and plots")
    args = parser.parse_args(arguments)
    settings = BenchSettings(
        batch_sizes=args.batch,
        prompts=args.prompt,
        gen=args.gen,
        repeats=args.repeats,
        warmup=args.warmup,
        fuse=not args.no_fuse,
        compile=args.compile,
        seed=args.seed,
    )
    if args.output is not None:
        check_output(args.output)
    config = llama_7b() if args.config is None else load_config(args.config, str(args.config))
    ratios = list(map(float, args.ratios.split(",")))
    models = random_models(config, ratios, getattr(torch, args.dtype), resolve_device(args.device), args.seed)
    record = benchmark_loaded(models, "dense", settings, reporter=ConsoleReporter())
    show_benchmark(record)
    if args.output is not None:
        store_benchmark(record, args.output)
    print(json.dumps(record.to_dict()))
    return record


if __name__ == "__main__":
    main()
