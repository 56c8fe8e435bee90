"""Quantises the factors, or dense linears, of a model without a text, and writes an ordinary folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from svdllm.checkpoint.elastic import ELASTIC_STEM
from svdllm.checkpoint.finish import RECIPE_FILE, finish_checkpoint
from svdllm.checkpoint.output import Output, new_folder
from svdllm.checkpoint.quantized import QuantizedLinear, choose_schemes
from svdllm.checkpoint.report import REPORT_FILE, is_checkpoint, read_report
from svdllm.checkpoint.tensors import stored_tensors
from svdllm.checkpoint.weight_sizes import weight_bytes
from svdllm.common.device import resolve_device
from svdllm.common.errors import InputError
from svdllm.common.extras import require_extra
from svdllm.common.memory import require_memory
from svdllm.common.progress import Reporter
from svdllm.common.run_options import RunOptions
from svdllm.common.version import __version__
from svdllm.compression.recipe_files import settings_of_copy
from svdllm.compression.rounded_sources import require_unrounded
from svdllm.export.quantize_integers import COMPRESSED_TENSORS
from svdllm.export.quantize_job import QuantizeFormat, QuantizeJob
from svdllm.export.quantize_torchao import TORCHAO
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.open import Source, open_config
from svdllm.models.skeleton import build_skeleton

FORMATS = {row.name: row for row in (COMPRESSED_TENSORS, TORCHAO)}


@dataclass(frozen=True, kw_only=True)
class QuantizationResult:
    """The record of a quantisation. Sizes are bytes of weight files."""

    output_dir: Path
    model: str
    format: str
    bits: int
    group_size: int | None
    linears: list[QuantizedLinear[Any]]
    left: dict[str, str]  # linears and embeddings that are not quantised -> the reason
    bytes_before: int
    bytes_after: int
    seconds: dict[str, float]

    def by_scheme(self) -> dict[str, int]:
        """Number of linears with each scheme."""
        names = [str(linear.scheme) for linear in self.linears]
        return {name: names.count(name) for name in dict.fromkeys(names)}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"by_scheme": self.by_scheme()}


def quantize(
    model: str | Path,
    output_dir: str | Path,
    *,
    bits: int = 8,
    group_size: int | None = None,
    skip: Sequence[str] = (),
    format: str = COMPRESSED_TENSORS.name,
    device: str = "auto",
    offline: bool = False,
    revision: str | None = None,
    reporter: Reporter | None = None,
) -> QuantizationResult:
    """Quantises the linears of a model's blocks and writes a folder that ``from_pretrained`` loads.

    Embeddings, ``lm_head``, norms and biases keep their dtype. A checkpoint of this library keeps its report, recipe,
    card and hashes, brought up to date.

    Args:
        model: a checkpoint, or a dense model (folder or hub id).
        output_dir: made by this call; must not exist, or be empty.
        bits: 8, 6, 5, 4, 3 or 2, of which every weight gets the nearest integer; in the format ``torchao`` 8, symmetric
            integers, or 4, NVFP4 (4-bit floats with an 8-bit scale for every 16).
        group_size: inputs that share a scale: 32, 64 or 128, by default 64; in the format ``torchao`` any number with 8
            bits, by default a whole row. A linear whose shape does not fit gets other groups.
        skip: regular expressions of linears that are not quantised.
        format: a row of ``FORMATS``.
        device: where the weights are rounded: auto, cpu, cuda, ...
        offline, revision: as for ``from_pretrained``, of a hub id.
        reporter: is told about stages.

    Raises:
        InputError: a package is missing, an option is wrong, the weights were rounded before, or the output exists;
            nothing is left behind.
        UnsupportedModelError: the model is already quantised, or cannot be.
        ResourceError: memory or disk is too small.
        CheckpointError: a file is missing or altered.
    """
    options = RunOptions.of(offline=offline, revision=revision, reporter=reporter)
    reporter, row = options.reporter, _format(format)
    require_extra(row.package, "quantising", extra="quantize")
    scheme = row.scheme(bits, group_size)
    with new_folder(output_dir, "a run") as (output, partial):
        with reporter.stage("check", 1):
            job, left = _checked(model, row, scheme, skip, partial, resolve_device(device), options)
            _require_room(job, row, output)
        source = job.source
        _warn_of_elastic_files(source, reporter)
        with reporter.stage("quantise", 1):
            row.write(job)
        result = QuantizationResult(
            output_dir=output.path,
            model=source.name,
            format=row.name,
            bits=bits,
            group_size=scheme.group_size,
            linears=list(job.linears),
            left=left,
            bytes_before=source.weight_bytes,
            bytes_after=weight_bytes(partial).files,
            seconds=reporter.seconds,
        )
        if source.folder is not None and is_checkpoint(source.folder):
            with reporter.stage("finish", 1):
                _finish(source.folder, partial, result, job.place, reporter)
    return result


def _format(name: str) -> QuantizeFormat:
    if name not in FORMATS:
        raise InputError(f"Unknown format {name!r}; known are {', '.join(FORMATS)}.")
    return FORMATS[name]


def _checked(
    model: str | Path,
    row: QuantizeFormat,
    scheme: Any,
    skip: Sequence[str],
    folder: Path,
    place: torch.device,
    options: RunOptions,
) -> tuple[QuantizeJob, dict[str, str]]:
    """The work to do, and what is left as it is with its reason; raises where the model cannot be quantised."""
    source = open_config(model, offline=options.offline, revision=options.revision)
    _require_quantizable(source)
    row.require(source, scheme.bits)
    skeleton = build_skeleton(source.config, split=())
    linears, left = choose_schemes(skeleton, scheme, skip)
    job = QuantizeJob(
        model=model, source=source, skeleton=skeleton, linears=linears, folder=folder, place=place, options=options
    )
    return job, left


def _require_quantizable(source: Source) -> None:
    if source.gguf is not None:
        raise InputError(
            f"{source.gguf} is a GGUF file, whose weights are already quantised. Quantise a folder of safetensors."
        )
    assert source.folder is not None
    if LowRankInfo.of(source.config) and not is_checkpoint(source.folder):
        raise InputError(
            f"{source.name} is a compressed model without {REPORT_FILE}. If the checkpoint is on the hub, download the "
            "whole repository first."
        )
    require_unrounded(source)


def _require_room(job: QuantizeJob, row: QuantizeFormat, output: Output) -> None:
    """Raises ResourceError where disk, or the memory of the format, does not suffice."""
    needed = row.num_bytes(stored_tensors(job.source, job.skeleton), job.linears)
    output.require_disk(needed, "the weights need")
    if row.in_memory and job.place.type == "cpu":  # on a GPU the weights do not stay in memory
        require_memory(needed, "The quantised weights need", job.place)


def _warn_of_elastic_files(source: Source, reporter: Reporter) -> None:
    if source.folder is not None and any(source.folder.glob(f"{ELASTIC_STEM}*")):
        reporter.warn("The smaller sizes of this elastic checkpoint are not carried over; slice before you quantise.")


def _finish(
    checkpoint: Path, partial: Path, result: QuantizationResult, place: torch.device, reporter: Reporter
) -> None:
    """Recipe, report, card, reference logits and hashes of a checkpoint that was quantised."""
    text, settings = settings_of_copy(checkpoint / RECIPE_FILE)
    report = _report(checkpoint, result) | {"recipe": settings}
    finish_checkpoint(partial, text, report, place, reporter)


def _report(folder: Path, result: QuantizationResult) -> dict[str, Any]:
    """The report of a checkpoint, brought up to date with its quantisation."""
    report = read_report(folder)
    packages = ("torch", result.format)
    report["quantization"] = {
        "format": result.format,
        "bits": result.bits,
        "group_size": result.group_size,
        "by_scheme": result.by_scheme(),
        "other_schemes": {linear.name: linear.reason for linear in result.linears if linear.reason},
        "left": result.left,
        "unquantized_file_bytes": report["file_bytes"],
        "versions": {"svdllm": __version__, **{name: version(name) for name in packages}},
    }
    return report | {"file_bytes": result.bytes_after, "elastic_bytes": 0, "quantized_file_bytes": None}
