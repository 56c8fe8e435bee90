"""Runs a benchmark: checks the models, loads them side by side, and measures them in turns."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from svdllm.checkpoint.load import load_model
from svdllm.common.device import device_name, resolve_device, resolve_dtype
from svdllm.common.errors import InputError
from svdllm.common.memory import explain_out_of_memory, parameter_bytes
from svdllm.common.progress import Reporter
from svdllm.common.version import __version__
from svdllm.inference.bench.checks import (
    check_alike,
    check_context,
    check_room,
    different_names,
    open_base,
    open_compressed,
    shortest_context,
)
from svdllm.inference.bench.measure import measure_cell
from svdllm.inference.bench.records import BenchmarkRecord, CellRecord, ModelRecord
from svdllm.inference.bench.roofline import shape_of
from svdllm.inference.bench.settings import BenchSettings
from svdllm.inference.prepare import Prepared, prepare
from svdllm.models.low_rank import FACTORED


def benchmark(
    models: Sequence[str | Path],
    base: str | Path | None = None,
    settings: BenchSettings | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    offline: bool = False,
    reporter: Reporter | None = None,
) -> BenchmarkRecord:
    """Measures speed and memory of compressed models, and of the dense model; all are in memory together.

    Args:
        models: checkpoints of svdllm, folders or hub ids.
        base: the dense model that they were made of; without it, no speed-ups are reported.
        dtype: of all models; auto is float32 on a CPU, else the dtype of the dense model, or else of the first model.
        threads: number of CPU threads; torch's by default.

    Raises:
        InputError, UnsupportedModelError, CheckpointError: a model cannot be used, or they do not belong together.
        ResourceError: the models do not fit into memory. If only a batch does not fit, its record says so.
    """
    settings, reporter = settings or BenchSettings(), reporter or Reporter()
    if threads is not None and threads < 1:
        raise InputError(f"--threads must be at least 1, found {threads}.")
    place = resolve_device(device)
    if place.type not in ("cpu", "cuda"):
        raise InputError(f"--device {device}: speed and memory are measured on cpu and cuda.")
    names = different_names(models, base)
    dense = None if base is None else next(iter(names))
    sources = {
        name: open_base(model, offline) if name == dense else open_compressed(model, offline)
        for name, model in names.items()
    }
    if dense is not None:
        check_alike(sources[dense], [source for name, source in sources.items() if name != dense])
    settings = settings.within(shortest_context(source.config for source in sources.values()))
    check_context(sources, settings)
    chosen = resolve_dtype(dtype, place, next(iter(sources.values())).dtype)
    check_room(sources.values(), chosen, place)
    loaded = {}
    for name, model in names.items():
        with reporter.stage(f"load {name}", 1), explain_out_of_memory("Measure fewer models at once."):
            loaded[name] = load_model(model, dtype=chosen, local_files_only=offline).to(place)  # type: ignore[arg-type]
    with _threads(threads):
        return benchmark_loaded(loaded, dense, settings, reporter=reporter)


def benchmark_loaded(
    models: Mapping[str, PreTrainedModel],
    base: str | None,
    settings: BenchSettings | None = None,
    *,
    reporter: Reporter | None = None,
) -> BenchmarkRecord:
    """Measures models in memory like ``benchmark``: models by name, all on one device and in one dtype.

    ``base`` names the dense model among them, if any. The models are put in evaluation mode, and the settings ``fuse``,
    ``kv_cache`` and ``compile`` change them.

    Raises:
        UnsupportedModelError: the cache of a model has no keys and values by layer.
    """
    settings, reporter = settings or BenchSettings(), reporter or Reporter()
    settings = settings.within(shortest_context(model.config for model in models.values()))
    shapes = {name: shape_of(model.eval()) for name, model in models.items()}
    prepared = {name: _prepare(model, settings) for name, model in models.items()}
    shapes = {name: shape.with_cache_of(models[name]) for name, shape in shapes.items()}
    for model in models.values() if settings.compile else ():
        model.compile(dynamic=False)
    cells: list[CellRecord] = []
    for batch, prompt in settings.cells:
        stage = reporter.stage(f"batch {batch}, prompt {prompt}", len(models) + settings.repeats)
        with stage, _compiled_for_one_shape(settings, len(models)):
            cells += measure_cell(models, shapes, base, batch, prompt, settings, reporter)
    records = tuple(
        ModelRecord(
            name=name,
            params=model.num_parameters(),
            parameter_bytes=parameter_bytes(model),
            linears=shapes[name].block_linears,
            **prepared[name]._asdict(),
        )
        for name, model in models.items()
    )
    machine = machine_facts(next(iter(models.values())))
    return BenchmarkRecord(base=base, models=records, cells=tuple(cells), settings=settings.to_dict(), machine=machine)


def machine_facts(model: PreTrainedModel) -> dict[str, Any]:
    """Records what speed depends on beside the model and the settings."""
    on_cuda = model.device.type == "cuda"
    return {
        "device": device_name(model.device),
        "device_type": model.device.type,
        "threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_cuda else None,
        "transformers": transformers.__version__,
        "svdllm": __version__,
    }


def _prepare(model: PreTrainedModel, settings: BenchSettings) -> Prepared:
    factored = any(isinstance(module, FACTORED) for module in model.modules())
    return prepare(model, fuse=settings.fuse, kv_cache=settings.kv_cache) if factored else Prepared(0, 0)


@contextmanager
def _compiled_for_one_shape(settings: BenchSettings, num_models: int) -> Iterator[None]:
    """Drops compiled code of other shapes, and makes it an error to exceed the limit of compiled versions.

    Models share the limit. Each needs four versions: prefill and decode, with a new and with a used cache.
    """
    if not settings.compile:
        yield
        return
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=4 * num_models, fail_on_recompile_limit_hit=True):
        yield


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
