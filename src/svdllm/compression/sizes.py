"""Predicts the size of a compressed model."""

from __future__ import annotations

from dataclasses import dataclass

from svdllm.checkpoint.quantized import require_dtype
from svdllm.checkpoint.tensors import file_bytes, num_params
from svdllm.compression.bytes_by_part import bits_per_weight, bytes_by_part
from svdllm.compression.forms import FORMS
from svdllm.compression.forms.layout import compressed_tensors, params, without_bits
from svdllm.compression.ranks.budget import elastic_bytes
from svdllm.compression.ranks.predicted_sizes import QuantizedFiles, WrittenFiles
from svdllm.compression.recipe import Recipe
from svdllm.compression.subject import Subject
from svdllm.models.chosen import Forms
from svdllm.models.experts import stacked_layout, untouched


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The size of a compressed model beside that of the dense one: parameters and bytes."""

    achieved_ratio: float  # share of the targets' parameters that is removed
    params: int
    dense_params: int
    file_bytes: int
    dense_file_bytes: int
    quantized_file_bytes: int | None  # after `svdllm quantize`, where the budget counts factor_bits
    elastic_bytes: int  # beside file_bytes; an upper limit while the forms are not known
    bits_per_weight: float  # of the targets, scales included
    bytes_by_part: dict[str, int]  # of file_bytes

    @property
    def final_file_bytes(self) -> int:
        """Bytes of the weight files once quantised, where the budget counts ``factor_bits``; else as written."""
        return self.file_bytes if self.quantized_file_bytes is None else self.quantized_file_bytes


def files_for(subject: Subject, recipe: Recipe) -> WrittenFiles:
    """The weight files whose bytes the recipe counts: as they are written, or once quantised to ``factor_bits``."""
    source, targets = subject.source, subject.structure.stored
    if recipe.factor_bits is None:
        return WrittenFiles(subject.stored, targets, buffers=subject.buffers)
    require_dtype(recipe.factor_bits, source.dtype, source.name)
    return QuantizedFiles.of(subject.skeleton, targets, source.dtype, recipe.factor_bits)


def sizes_of(subject: Subject, recipe: Recipe, files: WrittenFiles, forms: Forms, *, forms_known: bool) -> Sizes:
    """The size of a subject in given forms; ``files`` are those of ``files_for``."""
    stored, buffers, structure = subject.stored, subject.buffers, subject.structure
    places = subject.expert_tensors
    stacked = untouched(places, forms)
    written = stacked_layout(compressed_tensors(stored, structure.stored, forms), stacked)
    at_full_bits, full = written, without_bits(forms)
    if full != forms:
        at_full_bits = stacked_layout(compressed_tensors(stored, structure.targets, full), stacked)
    corrections = sum(
        params(t, chosen) - t.num_weights
        for t in structure.targets
        if (chosen := forms.get(t.name)) is not None and FORMS[chosen.form].curve == "correction"
    )
    kept = sum(params(target, forms.get(target.name)) for target in structure.targets)
    parts = bytes_by_part(written, structure)
    return Sizes(
        achieved_ratio=(structure.num_target_params - kept) / structure.num_target_params,
        params=num_params(at_full_bits, buffers) + corrections,
        dense_params=num_params(stored, buffers),
        file_bytes=sum(parts.values()),
        dense_file_bytes=file_bytes(stacked_layout(stored, places)),
        quantized_file_bytes=None if recipe.factor_bits is None else files.num_bytes(forms),
        elastic_bytes=elastic_bytes(recipe, structure, stored, forms, forms_known),
        bits_per_weight=bits_per_weight(parts, structure),
        bytes_by_part=parts,
    )
