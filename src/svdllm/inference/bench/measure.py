"""Measures all models at one batch size and prompt length in turns, so that a busy machine slows each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from svdllm.common.errors import ResourceError
from svdllm.common.memory import explain_out_of_memory
from svdllm.common.progress import Reporter
from svdllm.inference.bench.forward import turn
from svdllm.inference.bench.memory import measure_memory, require_cell_memory
from svdllm.inference.bench.records import CellRecord, MemoryUse, PhaseRecord, Spread
from svdllm.inference.bench.roofline import ModelShape, ideal
from svdllm.inference.bench.settings import BenchSettings

PHASES = ("prefill", "decode")


def measure_cell(
    models: Mapping[str, Any],
    shapes: Mapping[str, ModelShape],
    base: str | None,
    batch: int,
    prompt: int,
    settings: BenchSettings,
    reporter: Reporter,
) -> list[CellRecord]:
    """Measures every model on the same random tokens.

    First each model is warmed up, and its memory is measured. Then all take turns, in an order that changes from repeat
    to repeat. The record of a model that runs out of memory says so; the others go on.
    """
    ids_BS = random_ids(models, batch, prompt + settings.gen, settings.seed)
    errors: dict[str, str] = {}
    memory: dict[str, MemoryUse] = {}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for step, (name, model) in enumerate(models.items(), start=1):
        with _noting_lack_of_memory(errors, name):
            if ids_BS.device.type == "cpu":
                require_cell_memory(shapes[name], batch, prompt, settings.gen)
            for _ in range(settings.warmup):
                turn(model, ids_BS, prompt)
            memory[name] = measure_memory(model, shapes[name], ids_BS, prompt)
        reporter.advance(step, len(models) + settings.repeats)
    for repeat in range(settings.repeats):
        for name in order_of_turns(list(models), repeat):
            if name not in errors:
                with _noting_lack_of_memory(errors, name):
                    seconds[name].append(turn(models[name], ids_BS, prompt))
        reporter.advance(len(models) + repeat + 1, len(models) + settings.repeats)
    where: dict[str, Any] = {"batch": batch, "prompt": prompt, "gen": settings.gen}
    taken: dict[str, Any] = {
        name: dict(zip(PHASES, zip(*seconds[name], strict=True), strict=True)) for name in models if name not in errors
    }
    return [
        CellRecord(model=name, **where, error=errors[name])
        if name in errors
        else CellRecord(model=name, **where, memory=memory[name], **_phases(name, taken, base, shapes, where))
        for name in models
    ]


def order_of_turns(names: Sequence[str], repeat: int) -> list[str]:
    """Orders the models forwards and backwards in turn; each pair of repeats begins with another model."""
    start = repeat // 2 % len(names)
    order = [*names[start:], *names[:start]]
    return order[::-1] if repeat % 2 else order


def random_ids(models: Mapping[str, Any], batch: int, length: int, seed: int) -> Tensor:
    """Draws ids (batch, length) from the smallest vocabulary of the models, on their device."""
    vocabulary = min(model.config.get_text_config().vocab_size for model in models.values())
    ids_BS = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))
    return ids_BS.to(next(iter(models.values())).device)


def _phases(
    name: str,
    taken: Mapping[str, Mapping[str, Sequence[float]]],
    base: str | None,
    shapes: Mapping[str, ModelShape],
    where: Mapping[str, int],
) -> dict[str, Any]:
    records = {}
    for phase, tokens in zip(PHASES, (where["prompt"], where["gen"]), strict=True):
        seconds, compared = taken[name][phase], {}
        if base is not None and name != base:
            compared["ideal"] = ideal(phase, shapes[base], shapes[name], **where)
            if base in taken:
                pairs = zip(taken[base][phase], seconds, strict=True)
                compared["speed_up"] = Spread.of([dense / own for dense, own in pairs])
        records[phase] = PhaseRecord(tokens=where["batch"] * tokens, seconds=Spread.of(seconds), **compared)
    return records


@contextmanager
def _noting_lack_of_memory(errors: dict[str, str], name: str) -> Iterator[None]:
    try:
        with explain_out_of_memory("Lower --batch or --prompt."):
            yield
    except ResourceError as error:
        errors[name] = str(error)
    if name in errors and torch.cuda.is_available():
        torch.cuda.empty_cache()
