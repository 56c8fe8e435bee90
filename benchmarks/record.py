"""The whole record of a model, by one command that goes on after a kill.

Every step is a command of its own, and each of them keeps what it has finished:

- ``report``: ``svdllm compare`` of SVD-LLM and the presets, each with and without training, the methods of pruning and
  those of few bits, on the texts and on held-out code (made here, see ``code_text.py``)
- ``prediction``: the predicted loss of the compressed models beside their real one (``prediction.py``)
- ``calibration``: what the calibration text does (``calibration_text.py``), with ``--calib-texts``

Options that are not listed here go to ``svdllm compare``, such as ``--limit``, ``--offline`` or ``--device``.

    python benchmarks/record.py MODEL -o RECORD --calib wiki.valid.raw --ppl wiki.test.raw --ppl c4.jsonl \
        --recover 'data: alpaca.json, steps: 50' --tasks arc_easy,piqa --task-data tasks --limit 500
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from code_text import code_text
from svdllm.comparison import SIMULATED_SYSTEMS
from svdllm.pruning.settings import METHODS as PRUNING_METHODS

LOW_RANK = ("svd-llm", "balanced", "best")
FEW_BITS = (*SIMULATED_SYSTEMS, "svd-llm+quip-2")
CODE = "held-out-code.txt"
HERE = Path(__file__).parent

console = Console(stderr=True)


def methods(training: str | None) -> list[str]:
    """All rows of the record; those that are trained only where there is something to learn from."""
    trained = [f"{name}+{training}" for name in LOW_RANK] if training else []
    few_bits = [name for name in FEW_BITS if training or name != "onebit"]
    return [*LOW_RANK, *trained, *PRUNING_METHODS, *few_bits]


def steps(args: argparse.Namespace, others: Sequence[str]) -> dict[str, list[str]]:
    """Every step with its command."""
    calibration = ["--calib", args.calib, "--samples", str(args.samples), "--seqlen", str(args.seqlen)]
    texts = [part for text in [*args.ppl, str(args.output / CODE)] for part in ("--ppl", text)]
    windows = ["--ppl-seqlen", str(args.seqlen), "--ppl-windows", str(args.windows)]
    training = [] if args.recover is None else ["--recover", args.recover]
    python = sys.executable
    found = {
        "report": [
            *(python, "-m", "svdllm", "compare", args.model, "-o", str(args.output / "report")),
            *("--methods", ",".join(args.methods or methods(args.training if training else None))),
            *("--ratios", args.ratios, *calibration, *texts, *windows, *training, *others),
        ],
        "prediction": [
            *(python, str(HERE / "prediction.py"), args.model, "--work", str(args.output / "prediction")),
            *("--eval", args.ppl[0], *calibration),
        ],
    }
    if args.calib_texts:
        named = [part for text in args.calib_texts for part in ("--calib", text)]
        found["calibration"] = [
            *(python, str(HERE / "calibration_text.py"), args.model, "-o", str(args.output / "calibration")),
            *(*named, *texts, "--windows", str(args.windows)),
        ]
    return found


def parsed(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="hub id, folder or GGUF file")
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder of the record")
    parser.add_argument("--calib", required=True, help="calibration text")
    parser.add_argument("--ppl", required=True, action="append", help="text for perplexity; may be repeated")
    parser.add_argument("--methods", type=lambda text: text.split(","), help="all by default")
    parser.add_argument("--ratios", default="0.1,0.2,0.3,0.4,0.5,0.6")
    parser.add_argument("--training", default="distill", help="method of recovery, with --recover")
    parser.add_argument("--recover", help="settings of the training; without it nothing is trained")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32, help="windows of each text for perplexity")
    parser.add_argument("--calib-texts", action="append", metavar="NAME=TEXT", help="for the step calibration")
    parser.add_argument("--code-bytes", type=int, default=1_000_000)
    parser.add_argument("--steps", type=lambda text: text.split(","), help="some of the steps, as in report,prediction")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    args, others = parser.parse_known_args(arguments)
    if unknown := set(args.steps or ()) - set(steps(args, others)):
        parser.error(f"unknown steps {', '.join(sorted(unknown))}; there are {', '.join(steps(args, others))}")
    return args, others


def main(arguments: Sequence[str] | None = None) -> None:
    """Ends with the exit code of the first step that failed; the others are still run."""
    args, others = parsed(arguments)
    commands = {name: command for name, command in steps(args, others).items() if name in (args.steps or [name])}
    if args.dry_run:
        print("\n".join(map(shlex.join, commands.values())))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    if not (code := args.output / CODE).is_file():
        code.write_text(code_text("held-out", args.code_bytes), encoding="utf-8")
    failed: dict[str, int] = {}
    for name, command in commands.items():
        console.rule(name)
        if ended := subprocess.run(command, check=False).returncode:
            failed[name] = ended
            console.print(f"{name} ended with {ended}. The same command goes on.", style="red")
    if failed:
        sys.exit(next(iter(failed.values())) if min(failed.values()) > 0 else 1)


if __name__ == "__main__":
    main()
