"""Ratios at which models have weight files of given sizes."""

from __future__ import annotations

from collections.abc import Sequence

from svdllm.checkpoint.tensors import file_bytes, tensor_bytes
from svdllm.common.errors import InputError
from svdllm.common.run_options import RunOptions
from svdllm.compression.recipe import Recipe
from svdllm.compression.subject import discover_subject
from svdllm.models.open import open_config


def ratios_of_sizes(model: str, sizes: Sequence[int], options: RunOptions) -> tuple[float, ...]:
    """The share of the linears' parameters to remove so that weight files have so many bytes, in the dense dtype.

    Raises:
        InputError: the files of the dense model are no larger, or without its linears they are larger.
    """
    source = open_config(model, offline=options.offline, revision=options.revision)
    subject = discover_subject(source, Recipe(ratio=0.5, allow_partial=True))
    dense = file_bytes(subject.stored)
    linears = tensor_bytes(
        subject.stored, [f"{name}.weight" for target in subject.structure.targets for name in target.linears]
    )
    ratios = tuple((dense - size) / linears for size in sizes)
    for size, ratio in zip(sizes, ratios, strict=True):
        if not 0 < ratio < 1:
            raise InputError(
                f"--target-size: expected a size between {(dense - linears) / 1e6:,.1f} MB, all but the linears of "
                f"{model}, and {dense / 1e6:,.1f} MB, its weight files; found {size / 1e6:,.1f} MB."
            )
    return ratios
