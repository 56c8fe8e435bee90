"""Writes a compressed model as a checkpoint."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdllm.checkpoint.elastic import ELASTIC_STEM, ElasticIndex
from svdllm.checkpoint.finish import finish_checkpoint
from svdllm.checkpoint.output import FINISHED
from svdllm.checkpoint.report import REPORT_FILE
from svdllm.checkpoint.shards import write_shards
from svdllm.common.device import resolve_device
from svdllm.common.memory import device_peak_bytes, give_back_freed, peak_bytes
from svdllm.common.version import __version__
from svdllm.compression.analysis import Analysis, FinalFactors
from svdllm.compression.factors import TargetFactors
from svdllm.compression.few_tokens import ExpertTokens
from svdllm.compression.forms import FORMS, corrected_bits
from svdllm.compression.forms.layout import (
    compressed_tensors,
    elastic_tensors,
    embeddings_entry,
    forms_entry,
    quantization_entry,
)
from svdllm.compression.math.linalg import tail_energies
from svdllm.compression.plan import Plan
from svdllm.compression.ranks.budget import spare_forms
from svdllm.compression.records import (
    CompressionResult,
    LinearRecord,
    Provenance,
    linear_record,
    report_of,
)
from svdllm.compression.session import Run
from svdllm.compression.subject import Subject
from svdllm.models.chosen import Chosen, Forms
from svdllm.models.companions import GENERATION_CONFIG, copy_companion_files
from svdllm.models.experts import Stacked, stacked_layout, untouched
from svdllm.models.low_rank import FORMAT_VERSION, family_classes, low_rank_config
from svdllm.models.low_rank.lowrank import sha256_of
from svdllm.models.open import Source
from svdllm.models.safetensors_files import weight_files
from svdllm.models.structure import Target


def write(
    run: Run,
    subject: Subject,
    provenance: Provenance,
    analysis: Analysis,
    plan: Plan,
    finals: FinalFactors | None,
) -> CompressionResult:
    """Algorithm 1, lines 10 to 13, for one plan: truncates every weight and writes the checkpoint.

    A checkpoint that a killed run had finished is kept. Factors are slices of the bases in ``analysis``, unless
    ``finals`` has fitted ones.

    Raises:
        NumericalError: a factor overflows the dtype of the weights; names the linear.
    """
    ratio = f"ratio-{plan.recipe.ratio}" if len(run.recipe.single()) > 1 else ""
    folder = run.work / FINISHED / ratio
    linears = _linear_records(subject, plan, analysis)
    give_back_freed()  # by the sequential calibration
    with run.reporter.stage("write", len(subject.structure.blocks)):
        if run.processes.is_first and not (folder / REPORT_FILE).is_file():
            _write_checkpoint(folder, run, subject, provenance, analysis, plan, finals, linears)
    return CompressionResult(
        output_dir=run.output.path / ratio,
        recipe=plan.recipe,
        plan=plan,
        linears=linears,
        seconds=dict(run.reporter.seconds),
        peak_ram_bytes=max(run.processes.gather(peak_bytes())),
        peak_device_bytes=max(run.processes.gather(device_peak_bytes(resolve_device(plan.recipe.device)))),
        warnings=list(run.reporter.warnings),
    )


def _write_checkpoint(
    folder: Path,
    run: Run,
    subject: Subject,
    provenance: Provenance,
    analysis: Analysis,
    plan: Plan,
    finals: FinalFactors | None,
    linears: list[LinearRecord],
) -> None:
    """Writes a complete checkpoint; ``folder`` appears under its name when everything is in it."""
    partial = folder.with_name(f"{folder.name}.writing")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "svdllm").mkdir(parents=True)
    device = resolve_device(plan.recipe.device)
    factors = TargetFactors(subject, plan.forms, analysis, finals, device, run.reporter)
    layout = compressed_tensors(subject.stored, subject.structure.stored, plan.forms)
    stacked = untouched(subject.expert_tensors, plan.forms)
    write_shards(partial, Stacked(factors, stacked), stacked_layout(layout, stacked))
    _write_config(partial, subject, plan, provenance)
    copy_source_companions(partial, subject.source, run.tokenizer)
    if plan.recipe.elastic:
        spare = spare_forms(plan.recipe, subject.structure, plan.forms)
        factors = TargetFactors(subject, spare, analysis, None, device, run.reporter)
        _write_elastic(partial, subject, factors, spare, analysis, plan.recipe.allocation)
    experts = ExpertTokens.of(analysis.expert_tokens(), subject.structure.targets)
    report = report_of(plan, plan.recipe, provenance, linears, experts)
    finish_checkpoint(partial, plan.recipe.to_yaml(), report, device, run.reporter, run.scratch(plan))
    partial.replace(folder)


def _linear_records(subject: Subject, plan: Plan, analysis: Analysis) -> list[LinearRecord]:
    return [
        linear_record(
            target,
            plan.forms.get(target.name),
            _curve(target, plan, analysis),
            analysis.seconds(target.block).get(target.name, 0.0),
        )
        for target in subject.structure.targets
    ]


def _curve(target: Target, plan: Plan, analysis: Analysis) -> Tensor:
    """The squared error of a target at every size of its form."""
    chosen = plan.forms.get(target.name)
    if chosen is not None and (bits := FORMS[chosen.form].bits) is not None:
        return _rounding_curve(analysis.rounding(target), bits, chosen.size, analysis.energies(target).sum())
    if chosen is not None and FORMS[chosen.form].curve == "correction":
        tails = analysis.corrections(target)
        energy = analysis.energies(target).sum()[None]
        corrected = corrected_bits(plan.recipe.analysed_forms)
        return energy if tails is None else torch.cat([energy, tails[corrected.index(_base_bits(chosen))][1:]])
    if chosen is not None and FORMS[chosen.form].of_mlps and target.inner is not None:
        tails = analysis.narrowing_tails(target.block, target.inner.mlp)
        return tails if target.inner.side == "in" else tails * 0  # the rows that stay are as they were
    return tail_energies(analysis.energies(target))


def _base_bits(chosen: Chosen) -> int:
    base = FORMS[chosen.form].base
    assert base is not None
    assert base.bits is not None
    return base.bits


def _rounding_curve(errors: Mapping[int, float] | None, bits: int, size: int, energy: Tensor) -> Tensor:
    """The squared error of a rounded target, as a curve that falls from the whole energy to it."""
    error = (errors or {}).get(bits, 0.0)
    return torch.cat([energy[None], torch.full((size,), error, dtype=energy.dtype)])


def _write_config(folder: Path, subject: Subject, plan: Plan, provenance: Provenance) -> None:
    """Writes the config of the model: of the low-rank family, with the code of its classes, or of the family itself.

    A model whose linears are all as they are or in few bits needs no classes of ours.
    """
    source, entry = subject.source, _config_entry(subject, plan, provenance)
    is_ours = bool(entry["forms"]) or "embeddings" in entry
    config = low_rank_config(source.config, entry) if is_ours else copy.deepcopy(source.config)
    config.dtype = plan.dtype
    config.architectures = config.architectures or [type(subject.skeleton).__name__]
    if (quantization := quantization_entry(subject.structure, plan.forms)) is not None:
        config.quantization_config = quantization
    config.save_pretrained(folder)
    if is_ours:
        family_classes(source.config.model_type).causal_lm.write_code_files(folder)


def _write_elastic(
    folder: Path,
    subject: Subject,
    factors: TargetFactors,
    spare: Forms,
    analysis: Analysis,
    allocation: str,
) -> None:
    """Writes the files that smaller sizes are sliced from, beside the weights that are in the folder already."""
    stored = subject.stored
    layout = elastic_tensors(subject.structure, stored, spare)
    write_shards(folder, _WithEnergies(factors, analysis), layout, ELASTIC_STEM)
    weights = {path.name: sha256_of(path) for path in weight_files(folder)}
    ElasticIndex(stored=stored, probes=analysis.read_probes(allocation), weights=weights).write(folder)


class _WithEnergies:
    """Adds the energies of every target, as ``<target>.energies``, to the tensors of factors."""

    def __init__(self, factors: TargetFactors, analysis: Analysis):
        self._factors, self._analysis = factors, analysis

    def get(self, name: str) -> Tensor:
        target = self._factors.targets.get(name.removesuffix(".energies"))
        return self._factors.get(name) if target is None else self._analysis.energies(target)


def _config_entry(subject: Subject, plan: Plan, provenance: Provenance) -> dict[str, Any]:
    source = subject.source
    return {
        "format_version": FORMAT_VERSION,
        "base_model_type": source.config.model_type,
        **forms_entry(subject.structure.targets, plan.forms),
        **embeddings_entry(subject.structure, plan.forms),
        **({"bias_correction": True} if plan.recipe.bias_correction else {}),
        "library_version": __version__,
        "source": {"id": source.name, "revision": source.revision, "fingerprint": provenance.weights_fingerprint},
    }


def copy_source_companions(folder: Path, source: Source, tokenizer: Any) -> None:
    """Copies what belongs to a source beside its weights; ``tokenizer`` is saved in place of its own, if given."""
    if source.folder is not None:
        copy_companion_files(source.folder, folder, tokenizer=tokenizer is None)
    elif source.model is not None and source.model.generation_config is not None:
        # Not by save_pretrained, which refuses settings that generate only warns about.
        (folder / GENERATION_CONFIG).write_text(source.model.generation_config.to_json_string(), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
