"""Perplexity, size, time and memory of every method at every ratio, calibrated and evaluated alike.

Each compression runs in a process of its own, so that its peak memory is its own; with ``--repeats`` it is run again
for the spread of its time (the perplexity cannot differ).

    python benchmarks/quality.py MODEL --calib FILE --eval FILE --work DIR --ratios 0.2,0.4 --methods svd,asvd,svd-llm
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from svdllm import Recipe, compress_many, load_model, perplexity
from svdllm.common.device import resolve_device, resolve_dtype
from svdllm.compression.recipe import PLAIN
from svdllm.data import evaluation_tokens
from svdllm.models.open import open_config


def summary(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def compress_all(model: str, settings: dict[str, Any], output: str) -> tuple[float, list[dict[str, Any]]]:
    """Runs in its own process: seconds of one calibration with all ratios, and the records."""
    started = time.perf_counter()
    results = compress_many(model, Recipe(**(PLAIN | settings)), output)
    return time.perf_counter() - started, [result.to_dict() for result in results]


def measure(folder: str, ids: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    device = resolve_device(args.device)
    source_dtype = open_config(folder).dtype if Path(folder).is_dir() else torch.float32
    model = load_model(folder, dtype=resolve_dtype(args.dtype, device, source_dtype)).eval().to(device)  # type: ignore[arg-type]
    found = perplexity(model, ids, seqlen=args.seqlen, max_windows=args.windows)
    params = model.num_parameters()
    del model
    gc.collect()
    return {"perplexity": found.perplexity, "stderr": found.stderr, "mean_nll": found.mean_nll, "params": params}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, folder or GGUF file")
    parser.add_argument("--calib", required=True, help="calibration text")
    parser.add_argument("--eval", required=True, help="text for perplexity")
    parser.add_argument("--work", required=True, type=Path, help="new folder for the compressed models")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16, help="windows of the evaluation text")
    parser.add_argument("--ratios", default="0.2,0.4")
    parser.add_argument("--methods", default="svd,asvd,svd-llm")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    if args.work.exists() and any(args.work.iterdir()):
        parser.error(f"--work {args.work} is not empty")
    ratios = tuple(float(ratio) for ratio in args.ratios.split(","))
    source = open_config(args.model)
    ids = evaluation_tokens(args.eval, source.load_tokenizer())
    dense = measure(args.model, ids, args)
    rows = [{"model": "dense", "ratio": 0.0, **dense, "log_ratio": 0.0}]
    context = multiprocessing.get_context("spawn")
    for method in args.methods.split(","):
        settings = {
            "method": method,
            "ratio": ratios,
            "calibration": args.calib,
            "samples": args.samples,
            "seqlen": args.seqlen,
            "seed": args.seed,
            "device": args.device,
            "dtype": args.dtype,
        }
        seconds, records = [], []
        for repeat in range(args.repeats):
            output = args.work / f"{method}-{repeat}"
            with context.Pool(1) as pool:
                took, records = pool.apply(compress_all, (args.model, settings, str(output)))
            seconds.append(took)
            if repeat < args.repeats - 1:
                shutil.rmtree(output)
        for ratio, record in zip(ratios, records, strict=True):
            found = measure(record["output_dir"], ids, args)
            assert found["params"] == record["params"]
            rows.append(
                {
                    "model": method,
                    "ratio": ratio,
                    **found,
                    "log_ratio": found["mean_nll"] - dense["mean_nll"],
                    "file_bytes": record["file_bytes"],
                    "seconds_of_all_ratios": summary(seconds),
                    "peak_ram_bytes": record["peak_ram_bytes"],
                    "planned_ram_bytes": record["planned_ram_bytes"],
                }
            )
    report(rows, args, source.name)


def report(rows: list[dict[str, Any]], args: argparse.Namespace, name: str) -> None:
    columns = [
        "method",
        "ratio",
        "perplexity",
        "ln(ppl / dense)",
        "parameters",
        "seconds, all ratios",
        "peak RAM / planned",
    ]
    lines = []
    for row in rows:
        spread = "" if row["stderr"] is None else f" ± {number(row['stderr'])}"
        line = [
            row["model"],
            f"{row['ratio']:g}",
            number(row["perplexity"]) + spread,
            f"{row['log_ratio']:.3f}",
            f"{row['params']:,}",
        ]
        if "seconds_of_all_ratios" in row:
            took = row["seconds_of_all_ratios"]
            line.append(f"{took['median']:.1f} [{took['lower_quartile']:.1f}, {took['upper_quartile']:.1f}]")
            line.append(f"{row['peak_ram_bytes'] / 1e6:.0f} / {row['planned_ram_bytes'] / 1e6:.0f} MB")
        else:
            line += ["", ""]
        lines.append(line)
    table = Table(title=f"{name}: {args.samples} x {args.seqlen} tokens, {args.windows} windows of {args.seqlen}")
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    for line in lines:
        table.add_row(*line)
    Console(width=140).print(table)
    print("\n".join(["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]))
    for line in lines:
        print("| " + " | ".join(line) + " |")
    keys = ("samples", "seqlen", "windows", "seed", "repeats")
    settings = {key: getattr(args, key) for key in keys}
    print(json.dumps({"benchmark": "quality", "model": name, **settings, "torch": torch.__version__, "rows": rows}))


def number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) and value < 1e5 else f"{value:.3g}"


if __name__ == "__main__":
    main()
