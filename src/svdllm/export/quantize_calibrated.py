"""Quantises a dense model with a text: a compression that gives every linear of the blocks one form in few bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from svdllm.common.errors import InputError
from svdllm.common.run_options import RunOptions
from svdllm.compression.forms import FORMS
from svdllm.compression.forms.bits import BITS, DEFAULT_GROUP
from svdllm.compression.recipe_files import make_recipe
from svdllm.compression.records import CompressionResult
from svdllm.compression.run import compress

IN_BLOCKS = r"\.\d+\."  # in the name of every linear of a block, and in no other


def quantize_calibrated(
    model: str | Path,
    output_dir: str | Path,
    *,
    bits: int = 4,
    group_size: int | None = None,
    skip: Sequence[str] = (),
    calibration: str = "wikitext2",
    samples: int = 128,
    seqlen: int = 2048,
    device: str = "auto",
    options: RunOptions | None = None,
) -> CompressionResult:
    """Rounds the linears of a dense model's blocks, each fitted to the inputs that the rounded model hands it.

    Args:
        bits: of ``svdllm.compression.forms.bits.BITS``.
        group_size: inputs that share a scale; 64 by default. It must divide the inputs of every linear.
        skip: regular expressions of linears that stay dense.
        calibration, samples, seqlen: the text, as in a recipe.

    Raises:
        InputError, UnsupportedModelError, ResourceError, NumericalError: as ``compress``.
    """
    if bits not in BITS:
        raise InputError(f"--bits {bits} is not possible with a text: expected one of {', '.join(map(str, BITS))}.")
    form = FORMS[f"int{bits}"]
    one_for_all = {IN_BLOCKS: {form.name: group_size or DEFAULT_GROUP}}
    recipe = make_recipe(
        {
            "ranks": dict.fromkeys(skip, "dense") | one_for_all,
            "calibration": calibration,
            "samples": samples,
            "seqlen": seqlen,
            "device": device,
        },
        "quantize",
    )
    options = options or RunOptions.of()
    return compress(
        model, recipe, output_dir, offline=options.offline, revision=options.revision, reporter=options.reporter
    )
