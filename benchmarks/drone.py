"""DRONE against SVD-LLM on random matrices: Tables 9 and 10 of the SVD-LLM paper (arXiv 2403.07378, appendix A.5).

A weight of n x n and n tokens of n features, all standard normal in float32, truncated to rank n / 2: the paper does
not say so, but its losses do, to within 0.2 % (1.4 % for n = 128). SVD-LLM is this library's path, Gram and
decomposition; both compute in float64 and end in the two factors. The minimum is the tail of the singular values of W
X.

Each path has a process of its own, and the two run in turns, the first of a turn changing with every repeat. Times
are medians with quartiles; only their ratio means anything elsewhere. Beside other work take the processor's seconds
with one thread, which waiting is not in. Memory is what a path's process took at its highest beyond the two matrices,
in its first run.

    python benchmarks/drone.py --sizes 128,2048 --repeats 5
    python benchmarks/drone.py --sizes 4096 --repeats 1 --json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from decomposition import shown, summary
from drone_factors import drone_factors
from svdllm.common.memory import peak_bytes, resident_bytes
from svdllm.compression.math.linalg import factorise, output_spectrum
from svdllm.compression.math.statistics import Gram


def by_drone(weight_OI: Tensor, inputs_TI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    return drone_factors(weight_OI, [inputs_TI], rank)


def by_svd_llm(weight_OI: Tensor, inputs_TI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    gram = Gram(inputs_TI.shape[1])
    gram.add(inputs_TI)
    return factorise(weight_OI, output_spectrum(weight_OI, gram.value(), rank), rank)


PATHS = {"drone": by_drone, "svd-llm": by_svd_llm}
CLOCKS = ("seconds", "cpu_seconds")


def problem(size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, size, generator=generator), torch.randn(size, size, generator=generator)


def least_loss(size: int, seed: int) -> float:
    weight_OI, inputs_TI = problem(size, seed)
    sigma_K = torch.linalg.svdvals(weight_OI.double() @ inputs_TI.double().mT)
    return float(torch.linalg.vector_norm(sigma_K[size // 2 :]))


def prepare(threads: int) -> None:
    """Of a path's process: what is slow only the first time."""
    torch.set_num_threads(threads)
    for path in PATHS.values():
        path(*problem(32, 0), 16)


def compress(path: str, size: int, seed: int) -> dict[str, float]:
    """One compression in this process: seconds by the clock and of the processor, bytes and ``||W X - W' X||_F``."""
    weight_OI, inputs_TI = problem(size, seed)
    before, clock, processor = resident_bytes(), time.perf_counter(), time.process_time()
    u_OR, v_RI = PATHS[path](weight_OI, inputs_TI, size // 2)
    run = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - processor}
    taken = peak_bytes() - before
    lost_OT = (weight_OI.double() - u_OR @ v_RI) @ inputs_TI.double().mT
    return run | {"bytes": taken, "loss": float(torch.linalg.matrix_norm(lost_OT))}


def measure(size: int, args: argparse.Namespace) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    workers = {
        path: ProcessPoolExecutor(1, mp_context=context, initializer=prepare, initargs=(args.threads,))
        for path in PATHS
    }
    runs: dict[str, list[dict[str, float]]] = {path: [] for path in PATHS}
    for repeat in range(args.repeats):
        for path in list(PATHS) if repeat % 2 == 0 else reversed(list(PATHS)):
            runs[path].append(workers[path].submit(compress, path, size, args.seed).result())
    least = workers["drone"].submit(least_loss, size, args.seed).result()
    for worker in workers.values():
        worker.shutdown()
    paths = {
        path: {
            "loss": found[0]["loss"],
            "above_least": found[0]["loss"] / least - 1,
            "peak_bytes": found[0]["bytes"],
            **{clock: summary([run[clock] for run in found]) for clock in CLOCKS},
        }
        for path, found in runs.items()
    }
    pairs = list(zip(runs["drone"], runs["svd-llm"], strict=True))
    ratios = {clock: summary([theirs[clock] / ours[clock] for theirs, ours in pairs]) for clock in CLOCKS}
    return {"size": size, "rank": size // 2, "least_loss": least, "paths": paths, "drone_over_svd_llm": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="128,2048")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [measure(int(size), args) for size in args.sizes.split(",")]
    if args.json:
        settings = {"benchmark": "drone", "repeats": args.repeats, "threads": args.threads, "torch": torch.__version__}
        print(json.dumps(settings | {"problems": rows}))
        return
    table = Table(title=f"rank n / 2, {args.threads} threads, {args.repeats} repeats")
    for column in ("n", "path", "loss", "above least", "memory (MB)", "time (s)", "processor (s)"):
        table.add_column(column, justify="left" if column == "path" else "right")
    for row in rows:
        table.add_row(str(row["size"]), "least", f"{row['least_loss']:.4f}")
        for path, found in row["paths"].items():
            cells = [f"{found['loss']:.4f}", f"{found['above_least']:.1e}", f"{found['peak_bytes'] / 1e6:.1f}"]
            table.add_row("", path, *cells, *(shown(found[clock]) for clock in CLOCKS))
        ratios = row["drone_over_svd_llm"]
        table.add_row("", "drone / svd-llm", "", "", "", *(shown(ratios[clock]) for clock in CLOCKS))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
