"""Measures everything that needs a GPU, in order of worth, within given minutes; writes a JSON file and a page.

    python benchmarks/gpu_suite.py --minutes 8 --output DIR
    python benchmarks/gpu_suite.py --dry-run --output DIR        # every step on tiny shapes, on the CPU

Steps (``--steps`` names some of them):

- ``agreement``: tiny models of several families, compressed on the device and on the CPU in float32 in several forms,
  compared by logits: as loaded, with fused factors, decoded with the ordinary and the latent cache;
- ``compression``: a random model with the shapes of LLaMA-7B and few blocks, compressed by two presets;
- ``decode``: one step of the whole 7B at three ratios, replayed as a CUDA graph, against the dense model;
- ``decomposition``: the spectra of one 7B block against the paper's path (Cholesky, inverse, SVD) on the same device;
- ``inference``: prefill and decode without graphs, as ``svdllm bench`` measures them;
- ``latent``: bytes of the key-value cache and time of a step, with and without latents;
- ``distillation``: tokens per second of ``svdllm recover --method distill``;
- ``compression_70b``: one block of Llama-3-70B's shapes, and the time of all 80;
- ``compiled``: one step through ``torch.compile(mode="reduce-overhead")``;
- ``two_gpus``: the distillation by FSDP2, where there are two GPUs.

A step that fails is recorded with its message, and the others go on. When the time is over or the process is asked to
end (SIGTERM, Ctrl-C), the step that runs is cut off and what was measured is kept. Needs torch, transformers and this
package's sources; reads no model and no data.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers

import svdllm
from gpu_base import Record, Skipped, Suite
from gpu_compression import agreement, compression, compression_70b, decomposition
from gpu_page import page
from gpu_running import compiled, decode, inference, latent
from gpu_training import distillation, two_gpus
from svdllm.common.device import resolve_device

STEPS: dict[str, Callable[[Suite], Record]] = {
    step.__name__: step
    for step in (
        agreement,
        compression,
        decode,
        decomposition,
        inference,
        latent,
        distillation,
        compression_70b,
        compiled,
        two_gpus,
    )
}


class Ended(BaseException):
    """The time is over, or the process is asked to end; no library catches it."""


@contextmanager
def ended_by_signals(seconds: float) -> Iterator[None]:
    """Raises ``Ended`` after as many seconds, and on SIGTERM and SIGINT."""

    def end(number: int, frame: object) -> None:
        raise Ended("the time was over" if number == signal.SIGALRM else signal.Signals(number).name)

    numbers = (signal.SIGALRM, signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, end) for number in numbers]
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def run(suite: Suite, names: list[str], seconds: float) -> Iterator[tuple[str, Record]]:
    """Each step with its record, until the time is over."""
    ends = time.monotonic() + seconds
    why: str | None = None
    for name in names:
        if why is None and time.monotonic() >= ends:
            why = "the time was over"
        if why is not None:
            yield name, {"skipped": why}
            continue
        print(f"== {name}", flush=True)
        started = time.monotonic()
        try:
            with ended_by_signals(ends - started):
                record = STEPS[name](suite)
        except Ended as error:
            why = str(error)
            record = {"skipped": f"cut off after {time.monotonic() - started:.0f} s: {why}"}
        except Skipped as error:
            record = {"skipped": str(error)}
        except Exception as error:
            traceback.print_exc()
            record = {"error": f"{type(error).__name__}: {error}"[:2000]}
        if suite.device.type == "cuda":
            torch.cuda.empty_cache()
        yield name, record | {"step_seconds": time.monotonic() - started}


def machine(device: torch.device) -> Record:
    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "svdllm": svdllm.__version__,
        "python": sys.version.split()[0],
    }


def main(arguments: list[str] | None = None) -> Record:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="the step that runs after as many minutes is cut off")
    parser.add_argument("--output", type=Path, required=True, help="folder for gpu_suite.json and gpu_suite.md")
    parser.add_argument("--steps", default=",".join(STEPS), help="names of the steps, in order")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the model that is compressed")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--dry-run", action="store_true", help="every step on tiny shapes, on the CPU")
    args = parser.parse_args(arguments)
    names = args.steps.split(",")
    if unknown := [name for name in names if name not in STEPS]:
        parser.error(f"unknown steps {', '.join(unknown)}; there are {', '.join(STEPS)}")
    if not (args.dry_run or torch.cuda.is_available()):
        parser.exit(message="There is no GPU here. --dry-run tries every step on tiny shapes, on the CPU.\n")
    tiny = args.dry_run
    suite = Suite(
        device=resolve_device("cpu" if tiny else "cuda"),
        tiny=tiny,
        blocks=2 if tiny else args.blocks,
        samples=8 if tiny else args.samples,
        seqlen=32 if tiny else args.seqlen,
        repeats=1 if tiny else 5,
    )
    args.output.mkdir(parents=True, exist_ok=True)
    record: Record = {"machine": machine(suite.device), "minutes": args.minutes, "steps": {}}
    for name, found in run(suite, names, 60 * args.minutes):
        record["steps"][name] = found
        (args.output / "gpu_suite.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        (args.output / "gpu_suite.md").write_text(page(record), encoding="utf-8")
        print(json.dumps({name: found if name not in ("inference", "latent") else "see the file"}), flush=True)
    return record


if __name__ == "__main__":
    main()
