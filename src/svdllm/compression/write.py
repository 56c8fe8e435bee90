"""Writes a compressed model as a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from svdllm.checkpoint.elastic import ELASTIC_STEM, ElasticIndex
from svdllm.checkpoint.finish import finish_checkpoint
from svdllm.checkpoint.shards import write_shards
from svdllm.checkpoint.tensors import Tensors, compressed_tensors, elastic_tensors, stored_tensors
from svdllm.common.device import resolve_device
from svdllm.common.progress import Reporter
from svdllm.common.version import __version__
from svdllm.compression.analysis import Analysis, FinalFactors
from svdllm.compression.factors import TargetFactors
from svdllm.compression.plan import Plan
from svdllm.compression.ranks.budget import spare_ranks
from svdllm.compression.recipe import Recipe
from svdllm.compression.records import LinearRecord, Provenance
from svdllm.models.companions import GENERATION_CONFIG, copy_companion_files
from svdllm.models.low_rank import FORMAT_VERSION, family_classes, low_rank_config
from svdllm.models.low_rank.lowrank import sha256_of
from svdllm.models.open import Source
from svdllm.models.safetensors_files import weight_files
from svdllm.models.structure import Structure, linear_ranks, shared_factors


def write_checkpoint(
    folder: Path,
    *,
    source: Source,
    skeleton: PreTrainedModel,
    structure: Structure,
    plan: Plan,
    recipe: Recipe,
    analysis: Analysis,
    provenance: Provenance,
    linears: list[LinearRecord],
    finals: FinalFactors | None = None,
    tokenizer: Any = None,
    reporter: Reporter | None = None,
) -> None:
    """Writes a complete checkpoint; ``folder`` appears under its name when everything is in it.

    Factors are slices of the bases in ``analysis``, unless ``finals`` has them.
    """
    assert source.weights is not None
    reporter = reporter or Reporter()
    partial = folder.with_name(f"{folder.name}.writing")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "svdllm").mkdir(parents=True)
    device, stored = resolve_device(recipe.device), stored_tensors(source, skeleton)
    factors = TargetFactors(source.weights, structure, plan.ranks, analysis, finals, device, reporter)
    write_shards(partial, factors, compressed_tensors(stored, structure.targets, plan.ranks))
    config = low_rank_config(source.config, _config_entry(source, structure, plan, recipe, provenance))
    config.dtype = plan.dtype
    config.save_pretrained(partial)
    for name, text in family_classes(source.config.model_type).causal_lm.code_files().items():
        (partial / name).write_text(text, encoding="utf-8", newline="\n")
    _copy_companions(partial, source, tokenizer)
    if recipe.elastic:
        spare = spare_ranks(recipe, structure, plan.ranks)
        factors = TargetFactors(source.weights, structure, spare, analysis, None, device, reporter)
        _write_elastic(partial, factors, stored, elastic_tensors(structure, stored, spare), analysis, recipe.allocation)
    report = report_of(plan, recipe, provenance, linears)
    if finals is not None:
        report["betas"] = finals.betas()
    finish_checkpoint(partial, recipe.to_yaml(), report, device, reporter)
    partial.replace(folder)


def report_of(plan: Plan, recipe: Recipe, provenance: Provenance, linears: list[LinearRecord]) -> dict[str, Any]:
    """The content of ``svdllm/report.json``, without the times of the run."""
    import transformers

    return {
        "format_version": FORMAT_VERSION,
        "source": provenance.to_dict(),
        "method": plan.method,
        "recipe": recipe.to_dict(),
        "allocation": {
            "name": plan.allocation,
            "predicted_loss": plan.predicted_loss,
            "gap": plan.allocation_gap,
            "threshold": plan.allocation_threshold,
        },
        "speed": None if plan.speed is None else asdict(plan.speed),
        "linear_times": None if plan.linear_times is None else asdict(plan.linear_times),
        "ratio": plan.achieved_ratio,
        "params": plan.params,
        "dense_params": plan.dense_params,
        "file_bytes": plan.file_bytes,
        "dense_file_bytes": plan.dense_file_bytes,
        "elastic_bytes": plan.elastic_bytes,
        "quantized_file_bytes": plan.quantized_file_bytes,
        "versions": {"svdllm": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "warnings": plan.warnings,
        "unused_tensors": None if plan.unused_tensors is None else asdict(plan.unused_tensors),
        "linears": [asdict(record) for record in linears],
    }


def _write_elastic(
    folder: Path, factors: TargetFactors, stored: Tensors, layout: Tensors, analysis: Analysis, allocation: str
) -> None:
    """The files of which smaller sizes are made, beside the weights of the checkpoint that are in the folder already."""
    write_shards(folder, _WithEnergies(factors, analysis), layout, ELASTIC_STEM)
    weights = {path.name: sha256_of(path) for path in weight_files(folder)}
    ElasticIndex(stored=stored, probes=analysis.read_probes(allocation), weights=weights).write(folder)


class _WithEnergies:
    """Factors, and the energies of every target as ``<target>.energies``."""

    def __init__(self, factors: TargetFactors, analysis: Analysis):
        self._factors, self._analysis = factors, analysis

    def get(self, name: str) -> Tensor:
        target = self._factors.targets.get(name.removesuffix(".energies"))
        return self._factors.get(name) if target is None else self._analysis.energies(target)


def ranks_entry(structure: Structure, ranks: Mapping[str, int]) -> dict[str, Any]:
    """What ``config.json`` says of ranks by target: of every linear, and where several have one first factor."""
    shared = shared_factors(structure.targets, ranks)
    return {"ranks": linear_ranks(structure.targets, ranks), **({"shared_factors": shared} if shared else {})}


def _config_entry(
    source: Source, structure: Structure, plan: Plan, recipe: Recipe, provenance: Provenance
) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "base_model_type": source.config.model_type,
        **ranks_entry(structure, plan.ranks),
        **({"bias_correction": True} if recipe.bias_correction else {}),
        "library_version": __version__,
        "source": {"id": source.name, "revision": source.revision, "fingerprint": provenance.weights_fingerprint},
    }


def _copy_companions(folder: Path, source: Source, tokenizer: Any) -> None:
    if source.folder is not None:
        copy_companion_files(source.folder, folder, tokenizer=tokenizer is None)
    elif source.model is not None and source.model.generation_config is not None:
        # As it is: save_pretrained refuses settings that generate only warns about.
        (folder / GENERATION_CONFIG).write_text(source.model.generation_config.to_json_string(), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
