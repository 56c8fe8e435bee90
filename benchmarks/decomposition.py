"""Truncation as this package computes it against the paper's path, in one run, on a whole block's shapes.

The paper's path (SVD-LLM, Algorithms 1 and 2): for every weight a float64 Cholesky of its Gram, an explicit inverse
of the factor and an SVD of ``W S`` in float32. ``--share`` computes factor and inverse once per distinct input
instead. Both paths end in the two factors at the rank of ``--ratio``. They are measured in turns, the first of a turn
changing with every repeat; times are medians with quartiles, and only their ratio means anything elsewhere.

    python benchmarks/decomposition.py --repeats 5
    python benchmarks/decomposition.py --shapes llama-7b --repeats 1 --threads 1 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from svdllm.compression.math.linalg import factorise, output_spectrum
from svdllm.compression.ranks.uniform import uniform_rank
from svdllm.models.structure import Target

Factors = tuple[Tensor, Tensor]
Record = dict[str, Any]
PATHS = ("ours", "paper")


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
        Linear("k_proj", 4096, 4096, "attention"),
        Linear("v_proj", 4096, 4096, "attention"),
        Linear("o_proj", 4096, 4096, "heads"),
        Linear("gate_proj", 11008, 4096, "mlp"),
        Linear("up_proj", 11008, 4096, "mlp"),
        Linear("down_proj", 4096, 11008, "hidden"),
    ],
    "half-7b": [  # half the widths of LLaMA-7B
        Linear("q_proj", 2048, 2048, "attention"),
        Linear("up_proj", 5504, 2048, "attention"),
        Linear("down_proj", 2048, 5504, "hidden"),
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


class Problem(NamedTuple):
    """A block: weights (float32), the Grams of their inputs, and ranks."""

    linears: list[Linear]
    weights: dict[str, Tensor]
    grams: dict[str, Tensor]
    ranks: dict[str, int]

    @classmethod
    def random(cls, shapes: str, ratio: float, tokens_per_channel: float, seed: int) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        linears = SHAPES[shapes]
        widths = {linear.gram: linear.in_features for linear in linears}
        grams = {
            name: anisotropic_gram(width, int(width * tokens_per_channel), generator) for name, width in widths.items()
        }
        weights = {
            linear.name: torch.randn(linear.out_features, linear.in_features, generator=generator)
            / linear.in_features**0.5
            for linear in linears
        }
        return cls(linears, weights, grams, {linear.name: uniform_rank(as_target(linear), ratio) for linear in linears})

    def ours(self, linear: Linear) -> Factors:
        """As the analysis does it: directions in float32 up to the break-even rank, then the factors of a rank."""
        weight_OI, depth = self.weights[linear.name], as_target(linear).break_even_rank
        spectrum = output_spectrum(weight_OI, self.grams[linear.gram], depth, dtype=torch.float32)
        return factorise(weight_OI, spectrum, self.ranks[linear.name])

    def paper(self, linear: Linear, roots: dict[str, tuple[Tensor, Tensor]], share: bool) -> Factors:
        if not share or linear.gram not in roots:
            roots.clear()
            roots[linear.gram] = paper_root(self.grams[linear.gram])
        return paper_factors(self.weights[linear.name], *roots[linear.gram], self.ranks[linear.name])

    def relative_loss(self, linear: Linear, factors: Factors) -> float:
        weight_OI, gram_II = self.weights[linear.name].double(), self.grams[linear.gram]
        u_OR, v_RI = factors
        lost = squared_loss(weight_OI - u_OR.double() @ v_RI.double(), gram_II)
        return (lost / squared_loss(weight_OI, gram_II)) ** 0.5


def measured(problem: Problem, repeats: int, share: bool) -> Record:
    """Seconds of both paths by linear and of the block, and what they lose."""
    times: dict[tuple[str, str], list[float]] = {}
    losses: dict[tuple[str, str], float] = {}
    groups = list(problem.grams)
    for repeat in range(repeats):
        roots: dict[str, tuple[Tensor, Tensor]] = {}
        for linear in sorted(problem.linears, key=lambda linear: groups.index(linear.gram)):
            for path in PATHS if repeat % 2 == 0 else reversed(PATHS):
                started = time.perf_counter()
                made = problem.ours(linear) if path == "ours" else problem.paper(linear, roots, share)
                times.setdefault((path, linear.name), []).append(time.perf_counter() - started)
                if repeat == 0:
                    losses[path, linear.name] = problem.relative_loss(linear, made)
    rows = []
    for linear in problem.linears:
        row: Record = {"linear": linear.name, "shape": [linear.out_features, linear.in_features]}
        row["rank"] = problem.ranks[linear.name]
        row |= {f"{path}_seconds": summary(times[path, linear.name]) for path in PATHS}
        row |= {f"{path}_relative_loss": losses[path, linear.name] for path in PATHS}
        row["speedup"] = row["paper_seconds"]["median"] / row["ours_seconds"]["median"]
        rows.append(row)
    totals = {
        path: [sum(times[path, each.name][i] for each in problem.linears) for i in range(repeats)] for path in PATHS
    }
    speedups = [paper / ours for paper, ours in zip(totals["paper"], totals["ours"], strict=True)]
    block = {f"{path}_seconds": summary(totals[path]) for path in PATHS}
    return {"threads": torch.get_num_threads(), "linears": rows, **block, "speedup": summary(speedups)}


def show(console: Console, title: str, found: Record) -> None:
    table = Table(title=title)
    for column in ("linear", "shape", "rank", "ours (s)", "paper (s)", "paper / ours", "loss, ours", "loss, paper"):
        table.add_column(column, justify="left" if column == "linear" else "right")
    for row in found["linears"]:
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
    seconds = (shown(found[f"{path}_seconds"]) for path in PATHS)
    table.add_row("block", "", "", *seconds, f"{found['speedup']['median']:.2f}", "", "")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="smollm2")
    parser.add_argument("--ratio", type=float, default=0.2, help="share of the parameters removed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--tokens-per-channel", type=float, default=2.0, help="calibration tokens, by the Gram's width")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--share",
        action="store_true",
        help="the paper's path takes one Cholesky factor and inverse per distinct input instead of one per weight",
    )
    args = parser.parse_args()
    problem = Problem.random(args.shapes, args.ratio, args.tokens_per_channel, args.seed)
    record: Record = {"benchmark": "decomposition", "torch": torch.__version__, **vars(args), "runs": []}
    for threads in args.threads:
        torch.set_num_threads(threads)
        found = measured(problem, args.repeats, args.share)
        record["runs"].append(found)
        show(Console(width=140), f"{args.shapes}, ratio {args.ratio}, {threads} threads, {args.repeats} repeats", found)
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
