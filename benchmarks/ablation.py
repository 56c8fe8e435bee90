"""What each switch brings alone, and all together: perplexity at equal parameters on several texts.

Variants that share a calibration share its analysis, so times are put together from the stages that each needs; every
stage is run once. Finished variants are kept in ``--json`` and not run again.

    python benchmarks/ablation.py MODEL --calib FILE --eval wiki=FILE --eval c4=FILE --work DIR --json OUT.json
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from svdllm import CompressionResult, Recipe, __version__, compress_many, load_model, perplexity
from svdllm.common.device import resolve_device, resolve_dtype
from svdllm.compression.recipe import PLAIN
from svdllm.compression.recipe_files import preset_settings
from svdllm.data import evaluation_tokens
from svdllm.models.open import open_config

TWO_SIDED = {
    key: preset_settings("balanced")[key] for key in ("metric", "gradient_samples", "gradient_shrinkage", "input_only")
}
LOSS = {key: preset_settings("balanced")[key] for key in ("allocation", "probe_share", "round_to")}
DENSE = {"calibration_mode": "dense"}
CALIBRATION = ("calibration", "samples", "seqlen", "seed")


def preset(name: str) -> dict[str, Any]:
    return {key: value for key, value in preset_settings(name).items() if key not in CALIBRATION}


VARIANTS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "v2": {"allocation": "v2"},
    "effective-rank": {"allocation": "effective-rank"},
    "loss": LOSS,
    "sequential": {"calibration_mode": "sequential"},
    "shrinkage": {"shrinkage": preset_settings("balanced")["shrinkage"]},
    "bias": {"bias_correction": True},
    "two-sided and shrinkage": TWO_SIDED | {"shrinkage": preset_settings("balanced")["shrinkage"]},
    "balanced, pairs": preset("balanced") | DENSE | {"forms": ["pair"]},
    "balanced, packed": preset("balanced") | DENSE | {"forms": ["packed"]},
    "balanced, packed or narrow": preset("balanced") | DENSE,
    "balanced, residual stream left alone": preset("balanced") | {"residual_correction": 0.0},
    "balanced": preset("balanced"),
    "best": preset("best"),
}
# What decides an analysis; variants that agree in it share one.
OF_THE_ANALYSIS = (
    "metric",
    "gradient_samples",
    "gradient_shrinkage",
    "input_only",
    "shrinkage",
    "bias_correction",
    "probe_share",
    "used_forms",
)


def recipe_of(settings: dict[str, Any], args: argparse.Namespace) -> Recipe:
    calibration = {"calibration": args.calib, "samples": args.samples, "seqlen": args.seqlen, "seed": args.seed}
    return Recipe(**(PLAIN | settings | calibration | {"ratio": args.ratios, "device": args.device}))


def analysis_name(recipe: Recipe) -> str:
    settings = [str(getattr(recipe, key)) for key in OF_THE_ANALYSIS]
    return "analysis-" + hashlib.sha256(" ".join(settings).encode()).hexdigest()[:12]


def measure(folder: str | Path, texts: dict[str, torch.Tensor], args: argparse.Namespace) -> dict[str, Any]:
    device = resolve_device(args.device)
    model = load_model(folder, dtype=resolve_dtype("auto", device, torch.float32)).eval().to(device)  # type: ignore[arg-type]
    found = {name: perplexity(model, ids, seqlen=args.seqlen, max_windows=args.windows) for name, ids in texts.items()}
    params = model.num_parameters()
    del model
    gc.collect()
    rows = {name: {"perplexity": p.perplexity, "stderr": p.stderr, "mean_nll": p.mean_nll} for name, p in found.items()}
    return {"params": params, "texts": rows}


def compressed(name: str, args: argparse.Namespace, spent: dict[str, dict[str, float]]) -> list[CompressionResult]:
    """All ratios of a variant; ``spent`` collects the seconds of shared stages by analysis."""
    recipe = recipe_of(VARIANTS[name], args)
    shared = analysis_name(recipe)
    results = compress_many(args.model, recipe, args.work / name, analysis_dir=args.work / shared, resume=False)
    seconds = spent.setdefault(shared, {})
    for stage in ("analyze", "gradients", "probe"):
        seconds[stage] = max(seconds.get(stage, 0.0), results[0].seconds.get(stage, 0.0))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, folder or GGUF file")
    parser.add_argument("--calib", required=True, help="calibration text")
    parser.add_argument("--eval", action="append", required=True, metavar="NAME=TEXT", help="text for perplexity")
    parser.add_argument("--work", required=True, type=Path, help="folder for analyses and compressed models")
    parser.add_argument("--json", required=True, type=Path, help="results; finished variants in it are kept")
    parser.add_argument("--variants", default=";".join(VARIANTS), help="separated by semicolons")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16, help="windows of each evaluation text")
    parser.add_argument("--ratios", default="0.2,0.4,0.6")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="highest", choices=("highest", "high", "medium"), help="of products")
    args = parser.parse_args()
    args.ratios = tuple(float(ratio) for ratio in args.ratios.split(","))
    torch.set_float32_matmul_precision(args.precision)
    names = args.variants.split(";")
    if unknown := [name for name in names if name not in VARIANTS]:
        parser.error(f"unknown variants {', '.join(unknown)}; known are {', '.join(VARIANTS)}")
    tokenizer = open_config(args.model).load_tokenizer()
    texts = {name: evaluation_tokens(text, tokenizer) for name, _, text in (pair.partition("=") for pair in args.eval)}
    state: dict[str, Any] = json.loads(args.json.read_text()) if args.json.is_file() else {}
    if "dense" not in state:
        state |= {"dense": measure(args.model, texts, args), "variants": {}, "shared_seconds": {}}
    for name in names:
        if name in state["variants"]:
            continue
        rows = []
        for ratio, result in zip(args.ratios, compressed(name, args, state["shared_seconds"]), strict=True):
            own = {stage: s for stage, s in result.seconds.items() if stage not in ("analyze", "gradients", "probe")}
            rows.append(
                {
                    "ratio": ratio,
                    **measure(result.output_dir, texts, args),
                    "dense_linears": sum(linear.rank is None for linear in result.linears),
                    "shared": analysis_name(result.recipe),
                    "own_seconds_of_all_ratios": own,
                    "num_ratios": len(args.ratios),
                    "allocation_gap": result.plan.allocation.gap,
                }
            )
        state["variants"][name] = rows
        shutil.rmtree(args.work / name)
        state["settings"] = {
            "model": Path(args.model).name,
            "calibration": ", ".join(Path(part).name for part in args.calib.split(",")),
            "samples": args.samples,
            "seqlen": args.seqlen,
            "windows": args.windows,
            "precision": args.precision,
            "seed": args.seed,
            "versions": {"svdllm": __version__, "torch": torch.__version__},
        }
        args.json.write_text(json.dumps(state, indent=1) + "\n")
        print(markdown(state, list(texts)), flush=True)


def markdown(state: dict[str, Any], texts: list[str]) -> str:
    dense = state["dense"]["texts"]
    head = ["variant", "ratio", *(f"{text} ({dense[text]['perplexity']:.2f})" for text in texts)]
    head += ["ln(ppl / dense)", "parameters", "left dense", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    known = [*VARIANTS, *(name for name in state["variants"] if name not in VARIANTS)]
    for name in known:
        for row in state["variants"].get(name, []):
            cells = [name, f"{row['ratio']:.0%}"]
            for text in texts:
                found = row["texts"][text]
                cells.append(f"{found['perplexity']:.1f} ± {found['stderr'] or math.nan:.1f}")
            gaps = (row["texts"][text]["mean_nll"] - dense[text]["mean_nll"] for text in texts)
            cells.append(" / ".join(f"{gap:.2f}" for gap in gaps))
            cells += [f"{row['params']:,}", str(row["dense_linears"]), f"{seconds_of(state, row):.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def seconds_of(state: dict[str, Any], row: dict[str, Any]) -> float:
    """Of one ratio alone: the shared stages that it needs, and its part of what was done for every ratio."""
    shared = dict(state["shared_seconds"][row["shared"]])
    if row["allocation_gap"] is None:
        shared.pop("probe", None)
    own = row["own_seconds_of_all_ratios"]
    per_ratio = {"sequential", "write"}
    own_seconds = (s / row["num_ratios"] if stage in per_ratio else s for stage, s in own.items())
    return sum(shared.values()) + sum(own_seconds)


if __name__ == "__main__":
    main()
