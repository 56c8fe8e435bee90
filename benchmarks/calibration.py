"""The streamed walk with Grams against the bare forward pass of the same tokens through the whole model in memory.

Both run the same windows in the same batches, in turns, the first of a turn changing with every repeat. The walk reads
every block from disk; the bare forward has its weights loaded before the clock starts and leaves the head out. The
Grams of a few blocks are then compared with those of hooks on the whole model.

    python benchmarks/calibration.py MODEL --text FILE --samples 16 --seqlen 512
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from svdllm import load_model
from svdllm.common.device import resolve_device, resolve_dtype
from svdllm.compression.collect import collect_statistics
from svdllm.compression.math.metrics import METHODS
from svdllm.compression.math.statistics import Gram
from svdllm.data import calibration_windows
from svdllm.models.discover import discover
from svdllm.models.open import Source, open_source
from svdllm.models.skeleton import build_skeleton
from svdllm.models.structure import Structure
from svdllm.models.walk import Walk


def summary(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def make_walk(source: Source, ids: Tensor, device: torch.device, dtype: torch.dtype, batch_tokens: int) -> Walk:
    skeleton = build_skeleton(source.config, dtype)
    assert source.weights is not None
    return Walk(
        weights=source.weights,
        skeleton=skeleton,
        structure=discover(skeleton),
        ids=ids,
        device=device,
        dtype=dtype,
        batch_tokens=batch_tokens,
    )


def streamed_pass(walk: Walk, keep: set[int]) -> tuple[float, dict[str, Tensor]]:
    """Seconds of the walk with all Grams, and the Grams of the blocks in ``keep`` by the first linear of each group."""
    kept: dict[str, Tensor] = {}
    seconds, started = 0.0, time.perf_counter()
    for block in walk.blocks():
        targets = walk.structure.block_targets(block.index)
        found = collect_statistics(block, targets, METHODS["svd-llm"])
        synchronise(walk.device)
        seconds += time.perf_counter() - started
        if block.index in keep:
            kept |= {target.group: found[target.name].value() for target in targets}
        started = time.perf_counter()
    walk.close()
    return seconds, kept


def bare_pass(model: PreTrainedModel, ids: Tensor, batches: list[slice], device: torch.device) -> float:
    started = time.perf_counter()
    with torch.no_grad():
        for batch in batches:
            model.base_model(input_ids=ids[batch].to(device), use_cache=False)
    synchronise(device)
    return time.perf_counter() - started


def hooked_grams(
    model: PreTrainedModel,
    structure: Structure,
    ids: Tensor,
    batches: list[slice],
    device: torch.device,
    keep: set[int],
) -> dict[str, Tensor]:
    """Grams by plain hooks on the whole model."""
    grams: dict[str, Gram] = {}
    handles = []
    for target in structure.targets:
        if target.block in keep and target.group == target.name:
            gram = grams[target.name] = Gram(target.in_features, device)
            module = model.get_submodule(target.name)
            handles.append(module.register_forward_pre_hook(lambda _, args, gram=gram: gram.add(args[0])))
    try:
        bare_pass(model, ids, batches, device)
    finally:
        for handle in handles:
            handle.remove()
    return {name: gram.value() for name, gram in grams.items()}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, folder or GGUF file")
    parser.add_argument("--text", required=True, help="calibration text")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    device = resolve_device(args.device)
    with tempfile.TemporaryDirectory() as work:
        source = open_source(args.model, gguf_folder=Path(work) / "source")
        dtype = resolve_dtype(args.dtype, device, source.dtype)
        windows = calibration_windows(
            args.text, source.load_tokenizer(), samples=args.samples, seqlen=args.seqlen, seed=3
        )
        ids = windows.ids
        model = load_model(source.folder or args.model, dtype=dtype).eval().to(device)  # type: ignore[arg-type]
        walk = make_walk(source, ids, device, dtype, args.batch_tokens)
        structure, batches = walk.structure, walk.batches
        keep = {0, len(structure.blocks) // 2, len(structure.blocks) - 1}
        bare_pass(model, ids, batches[:1], device)  # warm-up
        times: dict[str, list[float]] = {"streamed": [], "bare": []}
        streamed: dict[str, Tensor] = {}
        for repeat in range(args.repeats):
            for path in ("streamed", "bare") if repeat % 2 == 0 else ("bare", "streamed"):
                if path == "bare":
                    times[path].append(bare_pass(model, ids, batches, device))
                else:
                    walk = make_walk(source, ids, device, dtype, args.batch_tokens)
                    seconds, streamed = streamed_pass(walk, keep)
                    times[path].append(seconds)
        hooked = hooked_grams(model, structure, ids, batches, device, keep)
    assert hooked.keys() == streamed.keys()
    difference = max(
        float((streamed[name] - hooked[name]).norm() / hooked[name].norm().clamp_min(1e-300)) for name in hooked
    )
    ratios = summary([a / b for a, b in zip(times["streamed"], times["bare"], strict=True)])
    record = {
        "benchmark": "calibration",
        "model": source.name,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens": ids.numel(),
        "batches": len(batches),
        "repeats": args.repeats,
        "streamed_seconds": summary(times["streamed"]),
        "bare_seconds": summary(times["bare"]),
        "ratio": ratios,
        "compared_blocks": sorted(keep),
        "largest_relative_gram_difference": difference,
    }
    table = Table(title=f"{source.name}: {ids.numel()} tokens in {len(batches)} batches, {args.repeats} repeats")
    for column in ("pass", "median (s)", "quartiles (s)", "tokens / s"):
        table.add_column(column, justify="left" if column == "pass" else "right")
    for name, label in (("streamed", "streamed walk with Grams"), ("bare", "bare forward, model in memory")):
        found = summary(times[name])
        spread = f"{found['lower_quartile']:.3f} to {found['upper_quartile']:.3f}"
        table.add_row(label, f"{found['median']:.3f}", spread, f"{ids.numel() / found['median']:.0f}")
    spread = f"{ratios['lower_quartile']:.2f} to {ratios['upper_quartile']:.2f}"
    table.add_row("streamed / bare", f"{ratios['median']:.2f}", spread, "")
    console = Console(width=140)
    console.print(table)
    console.print(f"Largest relative difference of a Gram (blocks {sorted(keep)}): {difference:.1e}")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
