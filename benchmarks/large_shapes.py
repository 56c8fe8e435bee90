"""Compresses two blocks of a large model's widths, and reports memory against the plan, and time by stage and block.

    python benchmarks/large_shapes.py --shape llama-2-7b --work DIR --json FILE

Weights are random, bfloat16 and on disk; so are the hidden states. Each run has a process of its own, so that its peak
memory is its own. The time of the whole model is that of the blocks here, times its blocks, and the rest once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import svdllm
from gpu_page import table
from svdllm.cli.console import ConsoleReporter
from svdllm.compression.recipe_files import preset_settings

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "vocab_size": 256},
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000},
    "llama-3-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
ALL_BLOCKS = {"tiny": 4, "llama-2-7b": 32, "llama-3-70b": 80}
BY_BLOCK = ("analyze", "gradients", "probe", "sequential", "write")  # stages whose time grows with the blocks


def write_model(folder: Path, shape: str, blocks: int) -> None:
    """Writes a random model, one tensor in memory at a time, with a file of each."""
    config = LlamaConfig(**SHAPES[shape], num_hidden_layers=blocks, architectures=["LlamaForCausalLM"])
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    generator, weight_map = torch.Generator().manual_seed(0), {}
    for number, (name, tensor) in enumerate(skeleton.state_dict().items()):
        scale = tensor.shape[-1] ** -0.5
        values = (
            torch.ones(tensor.shape) if tensor.ndim == 1 else torch.randn(tensor.shape, generator=generator) * scale
        )
        weight_map[name] = f"model-{number:05d}.safetensors"
        save_file({name: values.bfloat16()}, folder / weight_map[name], metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def compress(source: str, output: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Compresses the model, with hidden states on disk; what the run tells of itself, and its plan by stage."""
    recipe = svdllm.Recipe(**settings)
    vocab_size = json.loads((Path(source) / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (recipe.samples, recipe.seqlen), generator=generator)
    started = time.perf_counter()
    result = svdllm.compress(source, recipe, output, calibration=ids, hidden_states_limit=0, reporter=ConsoleReporter())
    return {
        "seconds": time.perf_counter() - started,
        "seconds_by_stage": result.seconds,
        "peak_ram_bytes": result.peak_ram_bytes,
        "planned_ram_bytes": result.plan.peak_ram_bytes,
        "planned_ram_by_stage": result.plan.needs.ram_by_stage,
        "planned_seconds_by_stage": result.plan.needs.seconds_by_stage,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--samples", type=int, default=4, help="windows of calibration text")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--work", type=Path, required=True, help="folder of the model and the checkpoint; removed")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    source, output = args.work / "dense", args.work / "compressed"
    source.mkdir(parents=True)
    try:
        write_model(source, args.shape, args.blocks)
        settings = preset_settings(args.preset) | {"ratio": args.ratio, "samples": args.samples, "seqlen": args.seqlen}
        settings["gradient_samples"] = min(args.samples, settings.get("gradient_samples", args.samples))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(compress, (str(source), str(output), settings))
    finally:
        shutil.rmtree(args.work)
    report(found, args)


def report(found: dict[str, Any], args: argparse.Namespace) -> None:
    """Prints the tables, and writes the JSON."""
    rows, whole = [], found["seconds"]
    for stage, seconds in found["seconds_by_stage"].items():
        each = seconds / args.blocks if stage in BY_BLOCK else 0.0
        whole += each * (ALL_BLOCKS[args.shape] - args.blocks)
        planned = found["planned_ram_by_stage"].get(stage)
        rows.append([stage, f"{seconds:.1f}", f"{each:.1f}" if each else "", f"{planned / 1e9:.2f}" if planned else ""])
    found |= {"shape": args.shape, "blocks": args.blocks, "samples": args.samples, "seqlen": args.seqlen}
    found |= {"seconds_of_all_blocks": whole, "peak_over_planned": found["peak_ram_bytes"] / found["planned_ram_bytes"]}
    print("\n".join(table(["stage", "seconds", "seconds a block", "planned memory (GB)"], rows)))
    print(
        f"\npeak {found['peak_ram_bytes'] / 1e9:.2f} GB, planned {found['planned_ram_bytes'] / 1e9:.2f} GB "
        f"({found['peak_over_planned']:.2f}); all {ALL_BLOCKS[args.shape]} blocks would take {whole / 3600:.2f} hours"
    )
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
