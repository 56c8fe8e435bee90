"""Perplexity at given bytes: what the knapsack chooses among all forms, beside single forms at their own sizes.

Every size is a run of ``compress --target-size`` over one analysis. Beside them: the dense model in 8 and in 4 bits,
rounded with error feedback, and low rank in 8 bits at the same sizes. Losses are compared window by window, so that the
standard error is that of the paired difference from the dense model.

    python benchmarks/few_bits.py MODEL --calib wiki.valid.raw --text wiki.test.raw -o RESULTS \\
        --sizes 145MB,112MB,105MB,94MB,88MB,80MB,70MB
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from math import exp
from pathlib import Path
from typing import Any

import torch

from svdllm import Recipe, compress
from svdllm.checkpoint.load import load_model
from svdllm.checkpoint.weight_sizes import weight_bytes
from svdllm.cli.readers import read_bytes
from svdllm.common.progress import Reporter
from svdllm.data import evaluation_tokens
from svdllm.evaluation.perplexity import perplexity
from svdllm.models.open import open_config

LOW_RANK = ("pair-int8", "packed-int8")
# Name -> bits of the linears; the embedding is in 8 bits.
SINGLE = {"dense in 8 bits": 8, "dense in 4 bits": 4}


def window_losses(folder: Path, texts: list[str], seqlen: int, windows: int) -> dict[str, list[float]]:
    """Mean negative log likelihood (nats) of every window of every text, in float32."""
    tokenizer = open_config(folder, allow_quantized=True).load_tokenizer(True)
    model = load_model(folder, dtype=torch.float32)
    losses = {}
    for text in texts:
        ids = evaluation_tokens(text, tokenizer, offline=True)[: windows * seqlen]
        losses[Path(text).name] = [perplexity(model, part, seqlen=seqlen).mean_nll for part in ids.split(seqlen)]
    return losses


def recipes(arguments: argparse.Namespace) -> Iterator[tuple[str, Recipe]]:
    text = {
        "calibration": arguments.calib,
        "samples": arguments.samples,
        "seqlen": arguments.seqlen,
        "gradient_samples": arguments.gradient_samples,
        "calibration_mode": arguments.calibration_mode,
    }
    chosen = {"forms": tuple(arguments.forms.split(","))} if arguments.forms else {"runtime": "transformers"}
    for size in arguments.sizes.split(","):
        budget = {"target_size": read_bytes(size, "--sizes")}
        yield f"all forms, {size}", Recipe(**budget, **chosen, **text)
        if not arguments.chosen_only:
            yield f"low rank in 8 bits, {size}", Recipe(**budget, forms=(*LOW_RANK, "int8"), **text)
    for name, bits in {} if arguments.chosen_only else SINGLE.items():
        linears = {f"int{bits}": 64}
        yield name, Recipe(**text, ranks={r"\.\d+\.": linears, "": {"int8": 64}})


def row(name: str, folder: Path, losses: dict[str, list[float]], dense: dict[str, list[float]]) -> dict[str, Any]:
    measured = {}
    for text, own in losses.items():
        differences = torch.tensor(own, dtype=torch.float64) - torch.tensor(dense[text], dtype=torch.float64)
        error = float(differences.std() / len(differences) ** 0.5) if len(differences) > 1 else 0.0
        ratio = exp(float(differences.mean()))
        measured[text] = {"perplexity": exp(sum(own) / len(own)), "times_dense": ratio, "stderr": ratio * error}
    return {"name": name, "file_bytes": weight_bytes(folder).files, "texts": measured}


def markdown(rows: list[dict[str, Any]]) -> str:
    texts = list(rows[0]["texts"])
    lines = [f"| model | MB | bits | {' | '.join(texts)} |", f"|---|---:|---:|{'---:|' * len(texts)}"]
    for entry in rows:
        cells = [
            f"{found['perplexity']:.2f} ({found['times_dense'] - 1:+.1%} ± {found['stderr']:.1%})"
            for found in entry["texts"].values()
        ]
        bits = "" if "bits_per_weight" not in entry else f"{entry['bits_per_weight']:.2f}"
        lines.append(f"| {entry['name']} | {entry['file_bytes'] / 1e6:.1f} | {bits} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--sizes", required=True)
    parser.add_argument("--forms", help="in place of all that transformers loads")
    parser.add_argument("--chosen-only", action="store_true", help="no single forms beside")
    parser.add_argument("--calibration-mode", default="sequential")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--gradient-samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("-o", "--output", type=Path, required=True, help="two files: this name with .json and .md")
    arguments = parser.parse_args()
    losses = window_losses(arguments.model, arguments.text, arguments.seqlen, arguments.windows)
    rows = [row("dense", arguments.model, losses, losses)]
    with tempfile.TemporaryDirectory() as work:
        for number, (name, recipe) in enumerate(recipes(arguments)):
            shared = Path(work) / f"analysis-{'-'.join(recipe.analysed_forms)}"
            result = compress(
                arguments.model,
                recipe,
                Path(work) / str(number),
                analysis_dir=shared,
                reporter=Reporter(),
                offline=True,
            )
            found = window_losses(result.output_dir, arguments.text, arguments.seqlen, arguments.windows)
            forms = Counter(chosen.form for chosen in result.plan.forms.values())
            rows.append(
                row(name, result.output_dir, found, losses)
                | {"forms": dict(forms), "predicted_loss": result.plan.allocation.predicted_loss}
                | asdict(result.plan.sizes)
            )
            arguments.output.with_suffix(".json").write_text(json.dumps(rows, indent=2) + "\n")
            arguments.output.with_suffix(".md").write_text(markdown(rows))
            print(name, rows[-1]["file_bytes"], dict(forms), rows[-1]["texts"], flush=True)
    print(markdown(rows))


if __name__ == "__main__":
    main()
