"""Slices smaller sizes from an elastic checkpoint: in seconds, without the source and without calibration text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from svdllm.checkpoint import load
from svdllm.checkpoint.finish import copy_companions, finish_checkpoint
from svdllm.checkpoint.output import new_folder
from svdllm.checkpoint.shards import write_shards
from svdllm.common.memory import device_peak_bytes, peak_bytes
from svdllm.common.progress import Reporter
from svdllm.compression.records import CompressionResult, LinearRecord, report_of
from svdllm.compression.room import require_room
from svdllm.compression.smaller_size import SmallerSize, find_size
from svdllm.models.low_rank import family_classes


def slice_checkpoint(
    folder: str | Path,
    ratio: float,
    output_dir: str | Path,
    *,
    forms: tuple[str, ...] = ("pair",),
    device: str | None = None,
    reporter: Reporter | None = None,
) -> CompressionResult:
    """Writes a smaller size of an elastic checkpoint as a checkpoint of its own.

    As pairs, all files but the report equal those that ``compress`` writes at this ratio, with the same options but
    ``elastic``. Packed, the ranks are larger, as far as the elastic checkpoint has them.

    Args:
        folder: an elastic checkpoint.
        ratio: share of the compressed linears' parameters that is removed; at least the checkpoint's own.
        output_dir: made by this call; must not exist, or be empty.
        forms: ``pair``, or also ``packed``.
        device: computes the reference logits; by default the device of the recipe.
        reporter: is told about stages and progress.

    Raises:
        InputError: the folder is not elastic, does not hold the ratio, or the output exists; nothing is left behind.
        CheckpointError: a file has changed since it was written; names it.
        ResourceError: the disk is too full.
    """
    reporter = reporter or Reporter()
    with new_folder(output_dir, "a slice") as (output, partial):
        with reporter.stage("check", 1):
            size = find_size(folder, ratio, device, forms=forms)
            require_room(output, size.plan)
        linears = size.linears()
        with reporter.stage("write", 1):
            _write(size, linears, partial, reporter)
    return CompressionResult(
        output_dir=output.path,
        recipe=size.recipe,
        plan=size.plan,
        linears=linears,
        seconds=dict(reporter.seconds),
        peak_ram_bytes=peak_bytes(),
        peak_device_bytes=device_peak_bytes(torch.device(size.plan.needs.device)),
        warnings=list(reporter.warnings),
    )


def load_model(model: str | Path, *, ratio: float | None = None, **kwargs: Any) -> PreTrainedModel:
    """Loads a model by ``from_pretrained``, compressed or not, with svdllm's errors.

    Args:
        model: a folder, a hub id, or a GGUF file.
        ratio: loads an elastic checkpoint at a smaller size, as ``slice_checkpoint`` would write it; at least the
            ratio of the checkpoint.
        kwargs: for ``from_pretrained``. Only safetensors are read, and code that comes with a model is not run.

    Warns of tensors in the files that the model does not use (``UnusedTensorsWarning``).

    Raises:
        CheckpointError: a file is missing, truncated or altered; names it.
        InputError: there is no such model, or it does not hold the ratio.
        UnsupportedModelError: it is not a causal language model.
    """
    return load.load_model(model, **kwargs) if ratio is None else load_slice(model, ratio, **kwargs)


def load_slice(folder: str | Path, ratio: float, **kwargs: Any) -> PreTrainedModel:
    """Loads the model that ``slice_checkpoint`` would write; ``kwargs`` are those of ``from_pretrained``.

    Raises:
        InputError, CheckpointError: as ``slice_checkpoint``.
    """
    size = find_size(folder, ratio, "cpu", check_integrity=kwargs.pop("check_integrity", True))
    classes = family_classes(size.subject.source.config.model_type)
    dtypes = {key: kwargs.pop(key) for key in ("dtype", "torch_dtype") if key in kwargs}
    config, kwargs = classes.config.from_dict(size.config_fields, return_unused_kwargs=True, **kwargs)
    tensors = {name: size.tensors.get(name) for name in size.layout}
    loaded: Any = classes.causal_lm.from_pretrained(None, config=config, state_dict=tensors, **dtypes, **kwargs)
    model = loaded[0] if kwargs.get("output_loading_info") else loaded
    model.name_or_path = model.config._name_or_path = str(size.folder)
    if (size.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(size.folder)
    return loaded


def _write(size: SmallerSize, linears: list[LinearRecord], partial: Path, reporter: Reporter) -> None:
    (partial / "svdllm").mkdir()
    write_shards(partial, size.tensors, size.layout)
    copy_companions(size.folder, partial)
    (partial / "config.json").write_text(
        json.dumps(size.config_fields, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    report = report_of(size.plan, size.recipe, size.provenance, linears)
    # The analysis is the elastic checkpoint's, and so are the versions that made it.
    report |= {
        "versions": size.report["versions"],
        "unused_tensors": size.report.get("unused_tensors"),
        "quantized_source": size.report.get("quantized_source"),
        "sliced_from": {"ratio": size.report["recipe"]["ratio"]},
    }
    finish_checkpoint(partial, size.recipe.to_yaml(), report, torch.device(size.plan.needs.device), reporter)
