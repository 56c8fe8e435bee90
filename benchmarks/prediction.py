"""The loss that the allocation predicts for a compressed model beside the loss that the model has (KL, nats per token).

Four figures for every ratio, each with one source of error more than the one before:

- ``predicted``: the sum over linears and MLPs that the knapsack minimised, by the probes and the curves between them
- ``one by one``: the same sum measured: each linear or MLP of the compressed model alone in the dense one, on the
  tokens of the probes. It differs by the curves, and by what follows the allocation, such as sequential calibration
- ``together``: the compressed model on the same tokens. It differs by the interaction of what was changed, and by what
  stays dense and is fitted to the compressed stream
- ``held out``: the compressed model on other text

    python benchmarks/prediction.py MODEL --calib wiki.valid.raw --eval wiki.test.raw --work OUT --ratios 0.2,0.4,0.6
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from svdllm import Recipe, compress, load_model
from svdllm.checkpoint.report import is_checkpoint, read_report
from svdllm.compression.forms import FORMS
from svdllm.compression.math.measures import divergence
from svdllm.compression.probe import probe_ids, probe_tokens
from svdllm.compression.recipe_files import make_recipe, preset_settings
from svdllm.data import calibration_windows, evaluation_tokens
from svdllm.models.discover import discover
from svdllm.models.open import open_config
from svdllm.models.skeleton import build_skeleton

Opened = Callable[[], AbstractContextManager[nn.Module]]
console = Console(stderr=True)


def divergences(dense: nn.Module, others: Sequence[Opened], ids_NT: Tensor) -> list[list[float]]:
    """KL divergence of each model from the dense one on every window, one window in memory at a time."""
    found: list[list[float]] = [[] for _ in others]
    with torch.no_grad():
        for ids_T in track(ids_NT, "windows", console=console):
            measure = divergence(_log_probabilities(dense, ids_T), ids_T)
            for values, opened in zip(found, others, strict=True):
                with opened() as model:
                    values.append(measure(_log_probabilities(model, ids_T)))
    return found


def _log_probabilities(model: nn.Module, ids_T: Tensor) -> Tensor:
    return model(input_ids=ids_T[None], use_cache=False).logits[0].float().log_softmax(-1)


def units(linears: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The linears that were changed, by what is changed at once: a linear, those of one first factor, or an MLP.

    Args:
        linears: of the report of a checkpoint.
    """
    found: dict[str, list[str]] = {}
    for row in linears:
        if row["size"] is not None:
            whole_mlp = row["form"] in FORMS and FORMS[row["form"]].of_mlps
            unit = row["name"].rpartition(".")[0] if whole_mlp else row["name"]
            found.setdefault(unit, []).extend(row["parts"] or [row["name"]])
    return list(found.values())


@contextmanager
def exchanged(dense: nn.Module, compressed: nn.Module, names: Sequence[str]) -> Iterator[nn.Module]:
    """The dense model with some linears of the compressed one."""
    own = {name: dense.get_submodule(name) for name in names}
    try:
        for name in names:
            dense.set_submodule(name, compressed.get_submodule(name))
        yield dense
    finally:
        for name, module in own.items():
            dense.set_submodule(name, module)


def measure(folder: Path, dense: nn.Module, probed_NT: Tensor, held_out_NT: Tensor) -> dict[str, Any]:
    """The four figures of one checkpoint."""
    report = read_report(folder)
    compressed = load_model(folder, dtype=torch.float32).eval()
    changed = units(report["linears"])
    alone = [lambda names=names: exchanged(dense, compressed, names) for names in changed]
    together, *each = divergences(dense, [lambda: nullcontext(compressed), *alone], probed_NT)
    (held_out,) = divergences(dense, [lambda: nullcontext(compressed)], held_out_NT)
    return {
        "ratio": report["ratio"],
        "changed": len(changed),
        "predicted": report["allocation"]["predicted_loss"],
        "one by one": sum(map(fmean, each)),
        "together": fmean(together),
        "held out": fmean(held_out),
        "held out stderr": stdev(held_out) / len(held_out) ** 0.5 if len(held_out) > 1 else None,
    }


def show(found: Sequence[dict[str, Any]], tokens: int) -> None:
    columns = ("ratio", "changed", "predicted", "one by one", "together", "held out")
    table = Table(*columns, title=f"KL (nats per token); probes on {tokens} tokens")
    for row in found:
        values = [f"{row[name]:.4f}" for name in columns[2:-1]]
        error = "" if row["held out stderr"] is None else f" ± {row['held out stderr']:.4f}"
        table.add_row(f"{row['ratio']:g}", str(row["changed"]), *values, f"{row['held out']:.4f}{error}")
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, folder or GGUF file; without experts")
    parser.add_argument("--calib", required=True, help="calibration text")
    parser.add_argument("--eval", required=True, help="held-out text")
    parser.add_argument("--work", required=True, type=Path, help="folder for the compressed models and the result")
    parser.add_argument("--recipe", default="balanced", help="a preset that allocates by loss")
    parser.add_argument("--set", default="{}", help="settings of the recipe, as JSON")
    parser.add_argument("--ratios", default="0.2,0.4,0.6")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16, help="windows of the held-out text")
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args(arguments)
    calibration = {"calibration": args.calib, "samples": args.samples, "seqlen": args.seqlen, "seed": args.seed}
    settings = {**preset_settings(args.recipe), **calibration, **json.loads(args.set)}
    recipe: Recipe = make_recipe(settings, "the recipe")
    folders = []
    for ratio in map(float, args.ratios.split(",")):
        folders.append(args.work / f"ratio-{ratio:g}")
        if not is_checkpoint(folders[-1]):
            sized = recipe.model_copy(update={"ratio": ratio})
            compress(args.model, sized, folders[-1], analysis_dir=args.work / "analysis")
    source = open_config(args.model)
    skeleton, tokenizer = build_skeleton(source.config, torch.float32), source.load_tokenizer()
    tokens = probe_tokens(recipe, discover(skeleton), skeleton)
    windows = calibration_windows(args.calib, tokenizer, samples=args.samples, seqlen=args.seqlen, seed=args.seed)
    ids = evaluation_tokens(args.eval, tokenizer)[: args.windows * args.seqlen]
    dense = load_model(args.model, dtype=torch.float32).eval()
    probed_NT, held_out_NT = probe_ids(windows.ids, tokens), ids.view(-1, args.seqlen)
    found = [measure(folder, dense, probed_NT, held_out_NT) for folder in folders]
    show(found, probed_NT.numel())
    keys = ("recipe", "samples", "seqlen", "windows", "seed")
    record = {"settings": {key: getattr(args, key) for key in keys} | {"set": json.loads(args.set)}, "ratios": found}
    (args.work / "prediction.json").write_text(
        json.dumps(record | {"probe_tokens": probed_NT.numel()}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
