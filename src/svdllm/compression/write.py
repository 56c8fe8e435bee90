"""Writes a compressed model as a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from svdllm.checkpoint.elastic import ELASTIC_STEM, ElasticIndex
from svdllm.checkpoint.finish import finish_checkpoint
from svdllm.checkpoint.output import FINISHED
from svdllm.checkpoint.report import REPORT_FILE
from svdllm.checkpoint.shards import write_shards
from svdllm.common.device import resolve_device
from svdllm.common.memory import device_peak_bytes, peak_bytes
from svdllm.common.version import __version__
from svdllm.compression.analysis import Analysis, FinalFactors
from svdllm.compression.factors import TargetFactors
from svdllm.compression.few_tokens import ExpertTokens
from svdllm.compression.forms import FORMS
from svdllm.compression.forms.layout import compressed_tensors, elastic_tensors, forms_entry
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
from svdllm.models.chosen import Forms
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
    with run.reporter.stage("write", len(subject.structure.blocks)):
        if not (folder / REPORT_FILE).is_file():
            _write_checkpoint(folder, run, subject, provenance, analysis, plan, finals, linears)
    return CompressionResult(
        output_dir=run.output.path / ratio,
        recipe=plan.recipe,
        plan=plan,
        linears=linears,
        seconds=dict(run.reporter.seconds),
        peak_ram_bytes=peak_bytes(),
        peak_device_bytes=device_peak_bytes(resolve_device(plan.recipe.device)),
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
    layout = compressed_tensors(subject.stored, subject.structure.targets, plan.forms)
    stacked = untouched(subject.expert_tensors, plan.forms)
    write_shards(partial, Stacked(factors, stacked), stacked_layout(layout, stacked))
    _write_config(partial, subject, plan, provenance)
    copy_companions(partial, subject.source, run.tokenizer)
    if plan.recipe.elastic:
        spare = spare_forms(plan.recipe, subject.structure, plan.forms)
        factors = TargetFactors(subject, spare, analysis, None, device, run.reporter)
        _write_elastic(partial, subject, factors, spare, analysis, plan.recipe.allocation)
    experts = ExpertTokens.of(analysis.expert_tokens(), subject.structure.targets)
    report = report_of(plan, plan.recipe, provenance, linears, experts)
    finish_checkpoint(partial, plan.recipe.to_yaml(), report, device, run.reporter)
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
    if chosen is not None and FORMS[chosen.form].of_mlps and target.inner is not None:
        tails = analysis.narrowing_tails(target.block, target.inner.mlp)
        return tails if target.inner.side == "in" else tails * 0  # the rows that stay are as they were
    return tail_energies(analysis.energies(target))


def _write_config(folder: Path, subject: Subject, plan: Plan, provenance: Provenance) -> None:
    """Writes the config of the low-rank model, and the code of its classes."""
    source = subject.source
    config = low_rank_config(source.config, _config_entry(subject, plan, provenance))
    config.dtype = plan.dtype
    config.save_pretrained(folder)
    for name, text in family_classes(source.config.model_type).causal_lm.code_files().items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


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
        **({"bias_correction": True} if plan.recipe.bias_correction else {}),
        "library_version": __version__,
        "source": {"id": source.name, "revision": source.revision, "fingerprint": provenance.weights_fingerprint},
    }


def copy_companions(folder: Path, source: Source, tokenizer: Any) -> None:
    """Copies what belongs to a source beside its weights; ``tokenizer`` is saved in place of its own, if given."""
    if source.folder is not None:
        copy_companion_files(source.folder, folder, tokenizer=tokenizer is None)
    elif source.model is not None and source.model.generation_config is not None:
        # Not by save_pretrained, which refuses settings that generate only warns about.
        (folder / GENERATION_CONFIG).write_text(source.model.generation_config.to_json_string(), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
