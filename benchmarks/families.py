"""Every causal LM type of transformers, tiny and random, through svdllm, and a table of what came of it.

Each model is built, saved and loaded again; its blocks are found and walked against the whole model. It is compressed
by two presets and at full rank, loaded again, by its own code files too, and verified. Logits with and without a cache
must agree, and those at full rank must be the dense model's. ``--allow-partial`` is set, so that every type is tried;
the column "share" says how much of the blocks could be compressed. The last line is JSON; a file of each model is in
``--output``.

    python benchmarks/families.py                       # all, in about twenty minutes
    python benchmarks/families.py llama "doge: experts"
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
SECONDS = 600  # of one model
REFUSALS = ("UnsupportedModelError", "InputError")
OK, REFUSED, WRONG, ERROR, NOT_BUILT, TIMEOUT = "ok", "refused", "wrong", "error", "not built", "timeout"


def file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def check(name: str, output: Path) -> None:
    """All that svdllm does with one model; writes its record."""
    from family_checks import FamilyChecks

    record: dict[str, Any] = {"name": name, "verdict": OK, "seconds": 0.0}
    checks = FamilyChecks(name, output / "models" / file_name(name))
    _judge(record, checks.steps())
    record["share"] = checks.share
    (output / f"{file_name(name)}.json").write_text(json.dumps(record, indent=1))


def check_code(name: str, output: Path) -> None:
    """Loads the compressed model by its code files, where svdllm is not imported."""
    from family_code import load_by_its_code

    file = output / f"{file_name(name)}.json"
    record = json.loads(file.read_text())
    if record["verdict"] == OK:
        _judge(record, [("load by its code files", lambda: load_by_its_code(output / "models" / file_name(name)))])
        file.write_text(json.dumps(record, indent=1))


def _judge(record: dict[str, Any], steps: list[tuple[str, Callable[[], None]]]) -> None:
    """Runs steps up to the first that fails, and notes which and why."""
    for label, step in steps:
        started = time.perf_counter()
        try:
            step()
        except Exception as error:
            kind = type(error).__name__
            refused = kind in REFUSALS and label.startswith(("find", "compress"))
            wrong = isinstance(error, AssertionError) or (kind in REFUSALS and not refused)
            verdict = NOT_BUILT if label == "build" else REFUSED if refused else WRONG if wrong else ERROR
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = "" if refused else f" ({Path(frame.filename).name}:{frame.lineno})"
            record |= {"verdict": verdict, "why": f"{label}: {kind}: {' '.join(str(error).split())[:400]}{place}"}
            return
        finally:
            record["seconds"] = round(record["seconds"] + time.perf_counter() - started, 2)


def each(work: Callable[[str, Path], None], names: list[str], output: Path) -> None:
    """Runs ``work`` for every name in a process of its own, one after the other, and prints its record."""
    fork = multiprocessing.get_context("fork")
    for number, name in enumerate(names, 1):
        process = fork.Process(target=_quietly, args=(work, name, output))
        process.start()
        process.join(SECONDS)
        file = output / f"{file_name(name)}.json"
        if process.is_alive() or process.exitcode or not file.exists():
            verdict, why = (TIMEOUT, f"{SECONDS} s") if process.is_alive() else (ERROR, f"exit {process.exitcode}")
            process.kill()
            process.join()
            file.write_text(json.dumps({"name": name, "verdict": verdict, "why": why, "seconds": SECONDS}))
        record = json.loads(file.read_text())
        print(f"{number:3}/{len(names)} {name:28} {record['verdict']:9} {record.get('why', '')[:120]}", flush=True)


def _quietly(work: Callable[[str, Path], None], name: str, output: Path) -> None:
    log = os.open(output / f"{file_name(name)}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    work(name, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types, or variants of tiny_needs.py; all by default")
    parser.add_argument("--output", type=Path, default=Path("build/families"))
    parser.add_argument("--part", choices=("all", "checks"), default="all", help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from tiny_needs import VARIANTS

    torch.set_num_threads(1)
    names = options.names or [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]
    options.output.mkdir(parents=True, exist_ok=True)
    if options.part == "checks":
        import svdllm  # noqa: F401 — once, for the processes that are forked

        each(check, names, options.output)
        return
    arguments = [*names, "--output", str(options.output), "--part", "checks"]
    subprocess.run([sys.executable, __file__, *arguments], check=True)  # another process: this one never imports svdllm
    each(check_code, names, options.output)
    shutil.rmtree(options.output / "models", ignore_errors=True)
    print_table([json.loads((options.output / f"{file_name(name)}.json").read_text()) for name in names])


def print_table(records: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "verdict", "share", "why", box=None)
    for record in records:
        share = f"{record['share']:.0%}" if record.get("share") is not None else ""
        table.add_row(record["name"], record["verdict"], share, record.get("why", "")[:200])
    Console(width=200).print(table)
    print(json.dumps({"verdicts": Counter(record["verdict"] for record in records), "records": records}))


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    main()
