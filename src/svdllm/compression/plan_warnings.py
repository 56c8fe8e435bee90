"""Warnings that a plan gives before the work: of the source, the calibration text, and what cannot be in few bits."""

from __future__ import annotations

from svdllm.compression.forms import FORMS
from svdllm.compression.math.metrics import METHODS
from svdllm.compression.probe import probe_sizes, probe_tokens
from svdllm.compression.ranks import ALLOCATIONS
from svdllm.compression.recipe import Recipe
from svdllm.compression.sizes import Sizes
from svdllm.compression.subject import Subject
from svdllm.models.quantized_sources.methods import QuantizedSource


def plan_warnings(subject: Subject, recipe: Recipe, sizes: Sizes) -> list[str]:
    """All warnings of a plan."""
    return [
        *calibration_warnings(subject, recipe, recipe.samples * recipe.seqlen),
        *_larger_than_source(sizes, subject.source.quantization),
        *_without_few_bits(subject, recipe),
    ]


def _without_few_bits(subject: Subject, recipe: Recipe) -> list[str]:
    """Names a linear that cannot be rounded as a whole, where the recipe may round linears."""
    forms = [FORMS[name] for name in recipe.used_forms if FORMS[name].bits is not None]
    targets = subject.structure.targets
    unable = [t for t in targets if not any(form.sizes(t, 1) for form in forms)] if forms else []
    if not unable:
        return []
    return [
        f"{len(unable)} of {len(targets)} linears, such as {unable[0].name}, cannot be stored in few bits: no program "
        "loads Conv1D, stacked experts, or joint keys and values so. They become factors, or keep the source's dtype."
    ]


def _larger_than_source(sizes: Sizes, source: QuantizedSource | None) -> list[str]:
    """Warns of a compressed model that is larger than the quantised files it is made of."""
    if source is None or source.file_bytes is None or sizes.final_file_bytes <= source.file_bytes:
        return []
    return [
        f"The compressed model has {sizes.final_file_bytes / 1e9:,.2f} GB, the {source.method} source only "
        f"{source.file_bytes / 1e9:,.2f} GB: factors have 16 bits. Remove more, or quantise the result (--target-size "
        "with --factor-bits)."
    ]


def calibration_warnings(subject: Subject, recipe: Recipe, num_tokens: int) -> list[str]:
    """Warns of too little calibration text for the Grams, or for probing."""
    warnings = []
    widest = max(subject.structure.targets, key=lambda target: target.in_features)
    if METHODS[recipe.method].collects_gram and num_tokens < widest.in_features:
        warnings.append(
            f"Only {num_tokens:,} calibration tokens ({recipe.samples} x {recipe.seqlen}), fewer than the widest input "
            f"has features ({widest.in_features:,}, {widest.name}): its Gram is singular and the result fits these "
            f"tokens only. Use at least {widest.in_features:,} tokens, better ten times as many."
        )
    structure, skeleton = subject.structure, subject.skeleton
    probing = ALLOCATIONS[recipe.allocation].probing
    if probing is not None and (probed := probe_tokens(recipe, structure, skeleton)) < probing.least_tokens:
        tried = sum(map(len, probe_sizes(recipe, structure).values()))
        warnings.append(
            f"Allocation {recipe.allocation} measures the loss of {tried:,} truncations on {probed:,} tokens only: "
            "chance has a part in which it takes. Use more --samples or --probe-share (now "
            f"{recipe.probe_share}){probing.advice}."
        )
    return warnings
