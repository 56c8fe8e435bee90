"""What the calibration text does: several texts, each with several numbers of tokens, at several ratios (Table 6).

Every text is drawn in windows of one length, so that only the text and the number of tokens vary; a text may be a
mixture. It is a grid as ``svdllm compare`` makes it: it goes on after a kill, and more texts or ratios add to it.

    python benchmarks/calibration_text.py MODEL -o OUT --calib wiki=train.txt --calib code=code-calibration.txt \
        --calib half=train.txt:0.5,code-calibration.txt:0.5 --ppl wiki.test.raw --ppl code-held-out.txt
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from svdllm.cli.console import ConsoleReporter
from svdllm.comparison import Grid, Measures, Variant, run_grid, variants_of
from svdllm.comparison.report import GridReport, write_report
from svdllm.comparison.table import text_names
from svdllm.models.model_names import short_name


def name_of(text: str, tokens: int) -> str:
    return f"{text}, {tokens} tokens"


def variants(args: argparse.Namespace) -> tuple[Variant, ...]:
    """The method with every text and every number of tokens."""
    found = []
    for text, source in args.texts.items():
        for tokens in args.tokens:
            length = min(args.window, tokens)
            calibration = {"calibration": source, "samples": tokens // length, "seqlen": length, "seed": args.seed}
            (variant,) = variants_of([args.method], calibration | {"device": args.device}, teacher=args.model)
            found.append(replace(variant, name=name_of(text, tokens)))
    return tuple(found)


def grid_of(args: argparse.Namespace) -> Grid:
    measures = Measures(
        texts=tuple(args.ppl), seqlen=args.seqlen, windows=args.windows, prompts=(), new_tokens=0, device=args.device
    )
    title = f"{short_name(args.model)}: calibration text, {args.method}"
    return Grid(model=args.model, variants=variants(args), ratios=args.ratios, measures=measures, title=title)


def markdown(records: Sequence[dict[str, Any]], args: argparse.Namespace) -> str:
    """ln(ppl / dense) of every text for perplexity: a table for each ratio, a row for each calibration text."""
    by_name = {record["name"]: record for record in records}
    lines: list[str] = []
    for ratio in args.ratios:
        for measured, short in text_names(args.ppl).items():
            lines += [f"**{ratio:.0%} removed, ln(ppl / dense) on {short}**", ""]
            lines += ["| calibration text | " + " | ".join(f"{tokens:,} tokens" for tokens in args.tokens) + " |"]
            lines += ["|---" * (1 + len(args.tokens)) + "|"]
            for text in args.texts:
                cells = (by_name.get(f"{name_of(text, tokens)} {ratio:.4g}") for tokens in args.tokens)
                lines.append(f"| {text} | " + " | ".join(_cell(cell, measured) for cell in cells) + " |")
            lines.append("")
    return "\n".join(lines)


def _cell(record: dict[str, Any] | None, text: str) -> str:
    if record is None or record["status"] != "done":
        return "–" if record is None else record["error"]["type"]
    row = record["perplexity"][text]
    error = "" if row["log_ratio_stderr"] is None else f" ± {row['log_ratio_stderr']:.3f}"
    return f"{row['log_ratio']:.3f}{error}"


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, folder or GGUF file")
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder of the grid")
    parser.add_argument("--calib", required=True, action="append", metavar="NAME=TEXT", help="calibration text")
    parser.add_argument("--ppl", required=True, action="append", help="text for perplexity; may be repeated")
    parser.add_argument("--method", default="balanced")
    parser.add_argument("--tokens", default="256,1024,4096,16384,65536")
    parser.add_argument("--window", type=int, default=256, help="tokens of a calibration window, at most")
    parser.add_argument("--ratios", default="0.2,0.4")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of a window for perplexity")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)
    args.texts = dict(text.split("=", 1) for text in args.calib)
    args.tokens = [int(tokens) for tokens in args.tokens.split(",")]
    args.ratios = tuple(float(ratio) for ratio in args.ratios.split(","))
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parsed(arguments)
    grid = grid_of(args)
    records = run_grid(grid, args.output, reporter=ConsoleReporter())
    write_report(GridReport(grid=grid, records=records), args.output)
    print(markdown(records, args))
    keys = ("method", "tokens", "window", "ratios", "seqlen", "windows", "seed")
    found = [{key: record.get(key) for key in ("name", "status", "perplexity", "error")} for record in records]
    (args.output / "calibration_text.json").write_text(
        json.dumps({"settings": {key: getattr(args, key) for key in keys}, "cells": found}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
