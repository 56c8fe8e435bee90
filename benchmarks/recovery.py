"""One compressed model trained in several ways: perplexity before and after on several texts, in one table.

Each variant is a name and settings of ``svdllm.recovery.make_recovery``, beyond those of ``--common``. Finished
variants are kept in ``--json`` and not run again.

    python benchmarks/recovery.py CHECKPOINT --work DIR --json OUT.json --eval wiki=FILE --eval c4=FILE \\
        --teacher MODEL --common 'data: alpaca.json, steps: 30, batch: 8, lr: 1e-3' \\
        --variant 'u first=order: u-first' --variant 'joint=order: joint, steps: 60'
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from svdllm import __version__, load_model, perplexity, recover
from svdllm.common.device import resolve_device
from svdllm.data import evaluation_tokens
from svdllm.models.open import open_config
from svdllm.recovery import make_recovery

WITHOUT_TEACHER = {"sequential-lora"}


def settings_of(text: str) -> dict[str, Any]:
    """A YAML mapping without its braces."""
    settings = yaml.safe_load(f"{{{text}}}")
    if "lr" in settings:
        settings["lr"] = float(settings["lr"])  # YAML takes 1e-3 for a word
    return settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a folder that svdllm compress made")
    parser.add_argument("--teacher", required=True, help="the dense model, measured beside them")
    parser.add_argument("--work", type=Path, required=True, help="folder for the trained models")
    parser.add_argument("--json", type=Path, required=True, help="results, kept between runs")
    parser.add_argument("--eval", action="append", required=True, metavar="NAME=TEXT")
    parser.add_argument("--common", default="", help="settings of all variants, as YAML")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=SETTINGS")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    console = Console(width=160)
    device = resolve_device(args.device)
    tokenizer = open_config(str(args.checkpoint)).load_tokenizer()
    texts = {}
    for text in args.eval:
        name, source = text.split("=", 1)
        texts[name] = evaluation_tokens(source, tokenizer)

    def measure(model: str | Path) -> dict[str, Any]:
        loaded = load_model(model, dtype=torch.float32).to(device)  # type: ignore[arg-type]
        return {
            name: perplexity(loaded, ids, seqlen=args.seqlen, max_windows=args.windows).to_dict()
            for name, ids in texts.items()
        }

    done: dict[str, Any] = json.loads(args.json.read_text()) if args.json.is_file() else {}
    done.setdefault("benchmark", "recovery")
    done.setdefault("versions", {"svdllm": __version__, "torch": torch.__version__})
    done.setdefault("threads", torch.get_num_threads())
    rows = done.setdefault("rows", {})

    def keep(name: str, row: dict[str, Any]) -> None:
        rows[name] = row
        args.json.write_text(json.dumps(done, indent=2))

    if "before" not in rows:
        keep("before", {"perplexity": measure(args.checkpoint)})
        keep("dense", {"perplexity": measure(args.teacher)})
    for variant in args.variant:
        name, _, wanted = variant.partition("=")
        if name in rows:
            continue
        settings = {"device": args.device} | settings_of(args.common) | settings_of(wanted)
        if not set(settings.get("methods", ("sequential-lora",))) <= WITHOUT_TEACHER:
            settings.setdefault("teacher", args.teacher)
        output = args.work / f"recovered-{re.sub('[^a-z0-9]+', '-', name.lower())}"
        started = time.perf_counter()
        result = recover(args.checkpoint, output, make_recovery(settings))
        seconds = time.perf_counter() - started
        history = result.history()
        row = {key: history[key] for key in ("settings", "tokens", "stages")}
        keep(name, row | {"seconds": seconds, "perplexity": measure(output)})
        shutil.rmtree(output)
        console.print(f"{name}: {seconds:.0f} s")
    table = Table(title=f"{args.checkpoint}: first {args.windows} windows of {args.seqlen} tokens")
    for column in ("variant", "tokens", "minutes", *texts):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, row in rows.items():
        cells = [
            f"{row['perplexity'][text]['perplexity']:.2f} ± {row['perplexity'][text]['stderr']:.2f}" for text in texts
        ]
        spent = f"{row['seconds'] / 60:.1f}" if "seconds" in row else ""
        table.add_row(name, f"{row['tokens']:,}" if "tokens" in row else "", spent, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
