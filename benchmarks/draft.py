"""Compressed models as drafts for speculative decoding of the dense one (``generate(assistant_model=...)``), in turns.

The dense model continues prompts greedily, without a draft and with each of them; what it writes stays the same up to
rounding. A draft proposes ``--draft-tokens`` tokens, and one pass of the dense model checks them (arXiv 2211.17192):

- ``accepted``: the share of the proposed tokens that the dense model keeps, and ``tokens``: those that a pass gives
- ``cost``: a step of the draft, and ``check``: a pass over the proposed tokens, both in steps of the dense model
- ``speed-up``: measured, and what it would be without overhead: ``tokens / (k cost + check)``
- ``pays below``: the cost from which it does, ``(tokens - check) / k``; and if a check cost no more than a step

    python benchmarks/draft.py MODEL OUT40 OUT60 OUT80 --prompts prompts.txt --draft-tokens 2,4,8 --new-tokens 64
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from svdllm import load_model
from svdllm.comparison.settings import PROMPTS
from svdllm.models.open import open_config

console = Console(stderr=True)


def opened(name: str) -> Any:
    """A model that writes as many tokens as it is asked for."""
    model: Any = load_model(name, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


@contextmanager
def counted_passes(model: Any) -> Iterator[list[int]]:
    """Collects the number of tokens of every forward pass of a model."""
    lengths: list[int] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        lengths.append((args[0] if args else kwargs["input_ids"]).shape[1])

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield lengths
    finally:
        handle.remove()


def proposed_and_kept(lengths: Sequence[int], prompt: int, written: int) -> tuple[int, int]:
    """Tokens that a draft proposed and that the dense model kept, by its passes over the prompt and the proposals.

    Every pass has one token more than it checks, and gives one token beside those that it keeps.
    """
    return sum(lengths) - prompt - (len(lengths) - 1), written - len(lengths)


def generate(model: Any, ids_1T: Tensor, new_tokens: int, draft: Any = None, num_drafted: int = 0) -> dict[str, Any]:
    """Writes ``new_tokens`` tokens; a draft proposes the same number of tokens each time."""
    more: dict[str, Any] = {}
    if draft is not None:
        settings = draft.generation_config
        settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = num_drafted, "constant"
        settings.assistant_confidence_threshold = 0.0
        more["assistant_model"] = draft
    with counted_passes(model) as lengths, torch.no_grad():
        started = time.perf_counter()
        written = model.generate(
            input_ids=ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            **more,
        )[0, ids_1T.shape[1] :]
        seconds = time.perf_counter() - started
    proposed, kept = proposed_and_kept(lengths, ids_1T.shape[1], len(written)) if draft is not None else (0, 0)
    return {"seconds": seconds, "ids": written, "passes": len(lengths), "proposed": proposed, "kept": kept}


def pass_seconds(models: dict[str, Any], ids_1T: Tensor, tokens: int, repeats: int) -> dict[str, float]:
    """Median seconds of a pass over some tokens behind a prompt, the models in turns."""
    found: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        caches = {name: model(input_ids=ids_1T, use_cache=True).past_key_values for name, model in models.items()}
        for _ in range(repeats):
            for name, model in models.items():
                started = time.perf_counter()
                model(input_ids=ids_1T[:, :1].repeat(1, tokens), past_key_values=caches[name])
                found[name].append(time.perf_counter() - started)
                caches[name].crop(-tokens)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def summary(
    runs: Sequence[dict[str, Any]], alone: Sequence[dict[str, Any]], drafted: int, cost: float, check: float
) -> dict[str, Any]:
    """What one draft brings over all prompts, beside the dense model alone on the same ones."""
    written, passes = sum(len(run["ids"]) for run in runs), sum(run["passes"] for run in runs)
    tokens = written / passes
    return {
        "draft_tokens": drafted,
        "accepted": sum(run["kept"] for run in runs) / sum(run["proposed"] for run in runs),
        "tokens": tokens,
        "cost": cost,
        "check": check,
        "speed_up": statistics.median(a["seconds"] / b["seconds"] for a, b in zip(alone, runs, strict=True)),
        "speed_up_without_overhead": tokens / (drafted * cost + check),
        "pays_below_cost": (tokens - check) / drafted,
        "pays_below_cost_if_a_check_is_a_step": (tokens - 1) / drafted,
        "same_text": statistics.fmean(torch.equal(a["ids"], b["ids"]) for a, b in zip(alone, runs, strict=True)),
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    tokenizer = open_config(args.model).load_tokenizer()
    dense, drafts = opened(args.model), {name: opened(name) for name in args.drafts}
    prompts = [torch.tensor(tokenizer(prompt)["input_ids"])[None] for prompt in args.prompts]
    step = pass_seconds({"": dense, **drafts}, prompts[0], 1, args.repeats)
    check = {k: pass_seconds({"": dense}, prompts[0], k + 1, args.repeats)[""] for k in args.draft_tokens}
    generate(dense, prompts[0], 4)  # warm-up
    alone: list[dict[str, Any]] = []
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {(d, k): [] for d in args.drafts for k in args.draft_tokens}
    for ids_1T in track(prompts, "prompts", console=console):
        alone.append(generate(dense, ids_1T, args.new_tokens))
        for (draft, drafted), found in runs.items():
            found.append(generate(dense, ids_1T, args.new_tokens, drafts[draft], drafted))
    unit = step[""]
    return [
        {"draft": draft} | summary(found, alone, drafted, step[draft] / unit, check[drafted] / unit)
        for (draft, drafted), found in runs.items()
    ]


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(
        *(
            "draft",
            "k",
            "accepted",
            "tokens",
            "cost",
            "check",
            "speed-up",
            "without overhead",
            "pays below",
            "same text",
        )
    )
    for row in rows:
        table.add_row(
            *(Path(row["draft"]).name, str(row["draft_tokens"]), f"{row['accepted']:.2f}", f"{row['tokens']:.2f}"),
            *(f"{row['cost']:.2f}", f"{row['check']:.2f}", f"{row['speed_up']:.2f}"),
            f"{row['speed_up_without_overhead']:.2f}",
            f"{row['pays_below_cost']:.2f} ({row['pays_below_cost_if_a_check_is_a_step']:.2f})",
            f"{row['same_text']:.0%}",
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the dense model: hub id or folder")
    parser.add_argument("drafts", nargs="+", help="compressed models with the same tokenizer")
    parser.add_argument("--prompts", type=Path, help="a file with a prompt in each line; those of reports by default")
    parser.add_argument("--draft-tokens", default="2,4,8", help="tokens that a draft proposes at once")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=8, help="of the passes that are timed alone")
    args = parser.parse_args(arguments)
    args.prompts = PROMPTS if args.prompts is None else args.prompts.read_text(encoding="utf-8").splitlines()
    args.draft_tokens = [int(tokens) for tokens in args.draft_tokens.split(",")]
    rows = measure(args)
    show(rows)
    print(json.dumps({"model": args.model, "threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
