"""Truncation by one ``eigh`` of the smaller side against the paper's path, in one run, on one block's shapes.

The paper's path (SVD-LLM, Algorithms 1 and 2): for every weight a float64 Cholesky of its Gram, an explicit inverse
of the factor and an SVD of ``W S`` in float32. ``--share`` computes factor and inverse once per distinct input
instead. Both paths end in the two factors at the rank of ``--ratio``. They are measured in turns, the first of a turn
changing with every repeat; times are medians with quartiles, and only their ratio means anything elsewhere.

    python benchmarks/decomposition.py --repeats 5
    python benchmarks/decomposition.py --shapes llama-7b --repeats 1
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from svdllm.compression.math.linalg import factorise, output_spectrum
from svdllm.compression.ranks.uniform import uniform_rank
from svdllm.models.structure import Target

Factors = tuple[Tensor, Tensor]


class Linear(NamedTuple):
    name: str
    out_features: int
    in_features: int
    gram: str  # linears of one name read the same input


SHAPES = {
    "smollm2": [
        Linear("q_proj", 576, 576, "attention"),
        Linear("k_proj", 192, 576, "attention"),
        Linear("v_proj", 192, 576, "attention"),
        Linear("o_proj", 576, 576, "heads"),
        Linear("gate_proj", 1536, 576, "mlp"),
        Linear("up_proj", 1536, 576, "mlp"),
        Linear("down_proj", 576, 1536, "hidden"),
    ],
    "llama-7b": [
        Linear("q_proj", 4096, 4096, "attention"),
        Linear("up_proj", 11008, 4096, "attention"),
        Linear("down_proj", 4096, 11008, "hidden"),
    ],
    "tiny": [Linear("wide", 24, 64, "a"), Linear("tall", 64, 24, "b"), Linear("square", 64, 64, "a")],
}


def anisotropic_gram(width: int, num_tokens: int, generator: torch.Generator) -> Tensor:
    """The Gram of inputs like a trained model's: a few strong common directions, channel scales over two decades."""
    scale_I = 10 ** (0.5 * torch.randn(width, generator=generator)).clamp(-1, 1)
    scale_I[torch.randint(width, (3,), generator=generator)] *= 30  # outlier channels
    directions_KI = torch.randn(32, width, generator=generator)
    gram_II = torch.zeros(width, width, dtype=torch.float64)
    for start in range(0, num_tokens, 2048):
        tokens = min(2048, num_tokens - start)
        common_TK = torch.randn(tokens, 32, generator=generator)
        x_TI = (common_TK @ directions_KI + torch.randn(tokens, width, generator=generator)) * scale_I
        gram_II += x_TI.T @ x_TI
    return (gram_II + gram_II.T) / 2


def paper_root(gram_II: Tensor) -> tuple[Tensor, Tensor]:
    """``S`` and its inverse in float64, damped as far as needed; what comes after is float32."""
    damping, eye = 0.0, torch.eye(len(gram_II), dtype=torch.float64, device=gram_II.device)
    while True:
        root_II, info = torch.linalg.cholesky_ex(gram_II + damping * eye)
        if info.item() == 0:
            return root_II, torch.linalg.inv(root_II)
        damping = max(10 * damping, 1e-6 * float(gram_II.diagonal().mean()))


def paper_factors(weight_OI: Tensor, root_II: Tensor, inverse_II: Tensor, rank: int) -> Factors:
    left, sigma, right = torch.linalg.svd(weight_OI @ root_II.float(), full_matrices=False)
    half = sigma[:rank].sqrt()
    return left[:, :rank] * half, half[:, None] * right[:rank] @ inverse_II.float()


def squared_loss(difference_OI: Tensor, gram_II: Tensor) -> float:
    """``tr(D C D^T)``."""
    return float((difference_OI @ gram_II * difference_OI).sum())


def summary(seconds: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="smollm2")
    parser.add_argument("--ratio", type=float, default=0.2, help="share of the parameters removed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens-per-channel", type=float, default=2.0, help="calibration tokens, by the Gram's width")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--share",
        action="store_true",
        help="the paper's path takes one Cholesky factor and inverse per distinct input instead of one per weight",
    )
    args = parser.parse_args()
    console = Console(width=140)
    generator = torch.Generator().manual_seed(args.seed)
    linears = SHAPES[args.shapes]
    widths = {linear.gram: linear.in_features for linear in linears}
    grams = {
        name: anisotropic_gram(width, int(width * args.tokens_per_channel), generator) for name, width in widths.items()
    }
    weights = {
        linear.name: torch.randn(linear.out_features, linear.in_features, generator=generator) / linear.in_features**0.5
        for linear in linears
    }
    ranks = {linear.name: uniform_rank(as_target(linear), args.ratio) for linear in linears}
    times: dict[str, list[float]] = {}
    results: dict[tuple[str, str], Factors] = {}

    def timed(key: str, work: Callable[..., Factors], *arguments: Any) -> Factors:
        started = time.perf_counter()
        result = work(*arguments)
        times.setdefault(key, []).append(time.perf_counter() - started)
        return result

    def ours(linear: Linear) -> Factors:
        weight_OI = weights[linear.name]
        spectrum = output_spectrum(weight_OI, grams[linear.gram], as_target(linear).break_even_rank)
        return factorise(weight_OI, spectrum, ranks[linear.name])

    def theirs(linear: Linear, roots: dict[str, tuple[Tensor, Tensor]]) -> Factors:
        if not args.share or linear.gram not in roots:
            roots.clear()
            roots[linear.gram] = paper_root(grams[linear.gram])
        return paper_factors(weights[linear.name], *roots[linear.gram], ranks[linear.name])

    for repeat in range(args.repeats):
        roots: dict[str, tuple[Tensor, Tensor]] = {}
        for linear in sorted(linears, key=lambda linear: list(widths).index(linear.gram)):
            paths = [("ours", ours, (linear,)), ("paper", theirs, (linear, roots))]
            for path, work, arguments in paths if repeat % 2 == 0 else reversed(paths):
                results[path, linear.name] = timed(f"{path} {linear.name}", work, *arguments)

    rows = []
    for linear in linears:
        weight_OI, gram_II = weights[linear.name].double(), grams[linear.gram]
        total = squared_loss(weight_OI, gram_II)
        row: dict[str, Any] = {
            "linear": linear.name,
            "shape": [linear.out_features, linear.in_features],
            "rank": ranks[linear.name],
        }
        for path in ("ours", "paper"):
            u_OR, v_RI = results[path, linear.name]
            row[f"{path}_seconds"] = summary(times[f"{path} {linear.name}"])
            row[f"{path}_relative_loss"] = (
                squared_loss(weight_OI - u_OR.double() @ v_RI.double(), gram_II) / total
            ) ** 0.5
        row["speedup"] = row["paper_seconds"]["median"] / row["ours_seconds"]["median"]
        rows.append(row)
    totals = {
        path: [sum(times[f"{path} {linear.name}"][repeat] for linear in linears) for repeat in range(args.repeats)]
        for path in ("ours", "paper")
    }
    speedups = [paper / our for paper, our in zip(totals["paper"], totals["ours"], strict=True)]

    table = Table(title=f"{args.shapes}, ratio {args.ratio}, {torch.get_num_threads()} threads, {args.repeats} repeats")
    for column in ("linear", "shape", "rank", "ours (s)", "paper (s)", "paper / ours", "loss, ours", "loss, paper"):
        table.add_column(column, justify="left" if column == "linear" else "right")
    for row in rows:
        table.add_row(
            row["linear"],
            "x".join(map(str, row["shape"])),
            str(row["rank"]),
            shown(row["ours_seconds"]),
            shown(row["paper_seconds"]),
            f"{row['speedup']:.2f}",
            f"{row['ours_relative_loss']:.8f}",
            f"{row['paper_relative_loss']:.8f}",
        )
    both, ratio = {path: summary(totals[path]) for path in totals}, summary(speedups)
    table.add_row("all", "", "", shown(both["ours"]), shown(both["paper"]), f"{ratio['median']:.2f}", "", "")
    console.print(table)
    record = {
        "benchmark": "decomposition",
        "shapes": args.shapes,
        "ratio": args.ratio,
        "repeats": args.repeats,
        "paper_shares_cholesky": args.share,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "linears": rows,
        "ours_seconds": both["ours"],
        "paper_seconds": both["paper"],
        "speedup": ratio,
    }
    print(json.dumps(record))


def as_target(linear: Linear) -> Target:
    return Target(
        name=linear.name,
        block=0,
        in_features=linear.in_features,
        out_features=linear.out_features,
        has_bias=False,
        is_conv1d=False,
        group=linear.gram,
    )


def shown(seconds: dict[str, float]) -> str:
    return f"{seconds['median']:.4f} [{seconds['lower_quartile']:.4f}, {seconds['upper_quartile']:.4f}]"


if __name__ == "__main__":
    main()
