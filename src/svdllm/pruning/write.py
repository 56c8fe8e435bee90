"""Writes a pruned model as a checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from svdllm.checkpoint.finish import finish_checkpoint
from svdllm.checkpoint.shards import write_shards
from svdllm.checkpoint.tensors import file_bytes, num_params, tensor_bytes
from svdllm.common.device import resolve_device
from svdllm.common.version import __version__
from svdllm.compression.records import Provenance
from svdllm.compression.session import Run
from svdllm.compression.subject import Subject
from svdllm.compression.write import copy_source_companions
from svdllm.models.experts import Stacked, stacked_layout, untouched
from svdllm.models.low_rank import FORMAT_VERSION, family_classes, low_rank_config
from svdllm.models.structure import Target
from svdllm.pruning.job import Job
from svdllm.pruning.made import Made


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The size of a pruned model beside that of the dense one."""

    achieved_ratio: float  # share of the linears' parameters by which the whole model is smaller
    params: int
    dense_params: int
    file_bytes: int
    dense_file_bytes: int


def write(folder: Path, run: Run, job: Job, made: Made, provenance: Provenance) -> Sizes:
    """Writes a complete checkpoint; ``folder`` appears when everything is in it.

    Raises:
        ResourceError: the disk has no room for it.
        NumericalError: a bias overflows, or the logits are not finite.
    """
    subject, settings = job.subject, job.settings
    partial = folder.with_name(f"{folder.name}.writing")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "svdllm").mkdir(parents=True)
    stacked = untouched(subject.expert_tensors, made.entry.get("forms", {}))
    run.output.require_disk(tensor_bytes(made.layout), "the weights need")
    written = stacked_layout(made.layout, stacked)
    write_shards(partial, Stacked(made.tensors, stacked), written)
    _write_config(partial, subject, made, provenance)
    copy_source_companions(partial, subject.source, run.tokenizer)
    sizes = _sizes(subject, made, written)
    report = _report(job, made, provenance, sizes)
    finish_checkpoint(partial, settings.to_yaml(), report, resolve_device(settings.device), run.reporter)
    partial.replace(folder)
    return sizes


def _sizes(subject: Subject, made: Made, written: Any) -> Sizes:
    params, dense = num_params(made.layout, subject.buffers), num_params(subject.stored, subject.buffers)
    return Sizes(
        achieved_ratio=made.removed / subject.structure.num_target_params,
        params=params,
        dense_params=dense,
        file_bytes=file_bytes(written),
        dense_file_bytes=file_bytes(stacked_layout(subject.stored, subject.expert_tensors)),
    )


def _write_config(folder: Path, subject: Subject, made: Made, provenance: Provenance) -> None:
    source = subject.source
    entry = {
        "format_version": FORMAT_VERSION,
        "base_model_type": source.config.model_type,
        "forms": {},
        **made.entry,
        "library_version": __version__,
        "source": {"id": source.name, "revision": source.revision, "fingerprint": provenance.weights_fingerprint},
    }
    config = low_rank_config(source.config, entry)
    for name, value in made.fields.items():
        setattr(config, name, value)
    config.dtype = source.dtype
    config.save_pretrained(folder)
    family_classes(source.config.model_type).causal_lm.write_code_files(folder)


def _report(job: Job, made: Made, provenance: Provenance, sizes: Sizes) -> dict[str, Any]:
    structure, settings, unused = job.subject.structure, job.settings, job.subject.source.unused
    return {
        "format_version": FORMAT_VERSION,
        "source": provenance.to_dict(),
        "method": settings.pruning,
        "recipe": settings.to_dict(),
        "pruning": made.details,
        "allocation": {"name": settings.pruning, "predicted_loss": None, "gap": None, "threshold": None},
        "ratio": settings.ratio,
        **asdict(sizes),
        "versions": {"svdllm": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "warnings": list(job.reporter.warnings),
        "unused_tensors": None if unused is None else asdict(unused),
        "dense_parts": [asdict(part) for part in structure.dense_parts],
        "linears": [_row(target, made) for target in structure.targets],
    }


def _row(target: Target, made: Made) -> dict[str, Any]:
    """A linear in the report; no error of it is known."""
    entry = made.entry.get("forms", {}).get(target.name)
    stored = made.layout.get(f"{target.name}.weight")
    return {
        "name": target.name,
        "parts": [],
        "block": target.block,
        "out_features": target.out_features,
        "in_features": target.in_features,
        "form": "dropped" if stored is None else "dense" if entry is None else "narrow",
        "size": None if entry is None else entry.get("in_features", entry.get("out_features")),
        "rank": None,
        "params": 0 if stored is None else torch.Size(stored[0]).numel(),
        "kept_energy": None,
    }
