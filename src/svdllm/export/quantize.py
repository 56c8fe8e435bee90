"""Quantises the factors, or dense linears, of a model to 8 or 4 bits with torchao, and writes an ordinary folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from svdllm.checkpoint.elastic import ELASTIC_STEM
from svdllm.checkpoint.finish import RECIPE_FILE, finish_checkpoint
from svdllm.checkpoint.load import load_model
from svdllm.checkpoint.output import Output, new_folder
from svdllm.checkpoint.quantized import (
    QuantizedLinear,
    Scheme,
    choose_schemes,
    make_scheme,
    quantization_config,
    quantized_bytes,
    require_dtype,
)
from svdllm.checkpoint.report import REPORT_FILE, is_checkpoint, read_report
from svdllm.checkpoint.tensors import SHARD_BYTES, stored_tensors
from svdllm.checkpoint.weight_sizes import weight_bytes
from svdllm.common.device import resolve_device
from svdllm.common.errors import InputError
from svdllm.common.extras import require_extra
from svdllm.common.memory import require_memory
from svdllm.common.progress import Reporter
from svdllm.common.version import __version__
from svdllm.compression.recipe_files import settings_of_copy
from svdllm.models.companions import copy_companion_files
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.open import Source, open_config
from svdllm.models.skeleton import build_skeleton


@dataclass(frozen=True, kw_only=True)
class QuantizationResult:
    """The record of a quantisation. Sizes are bytes of weight files."""

    output_dir: Path
    model: str
    bits: int
    group_size: int | None
    linears: list[QuantizedLinear]
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
        bits: 8, symmetric integers; or 4, NVFP4 (4-bit floats with an 8-bit scale for every 16). A linear whose shape
            does not fit gets 8 bits and a scale per row.
        group_size: inputs that share a scale, with 8 bits; by default a whole row.
        skip: regular expressions of linears that are not quantised.
        device: where the weights are rounded: auto, cpu, cuda, ...
        offline, revision: as for ``from_pretrained``, of a hub id.
        reporter: is told about stages.

    Raises:
        InputError: torchao is missing, an option is wrong, or the output exists; nothing is left behind.
        UnsupportedModelError: the model is already quantised, or cannot be.
        ResourceError: memory or disk is too small.
        CheckpointError: a file is missing or altered.
    """
    reporter = reporter or Reporter()
    require_extra("torchao", "quantising", extra="quantize")
    scheme = make_scheme(bits, group_size)
    with new_folder(output_dir, "a run") as (output, partial):
        with reporter.stage("check", 1):
            source, place = open_config(model, offline=offline, revision=revision), resolve_device(device)
            linears, left = _choose_linears(source, scheme, skip, place, output)
        _warn_of_elastic_files(source, reporter)
        options = {"local_files_only": offline} | ({} if revision is None else {"revision": revision})
        _round_and_write(model, partial, source, linears, place, options, reporter)
        result = QuantizationResult(
            output_dir=output.path,
            model=source.name,
            bits=bits,
            group_size=scheme.group_size,
            linears=linears,
            left=left,
            bytes_before=source.weight_bytes,
            bytes_after=weight_bytes(partial).files,
            seconds=reporter.seconds,
        )
        if source.folder is not None and is_checkpoint(source.folder):
            with reporter.stage("finish", 1):
                _finish(source.folder, partial, result, place, reporter)
    return result


def _choose_linears(
    source: Source, scheme: Scheme, skip: Sequence[str], place: torch.device, output: Output
) -> tuple[list[QuantizedLinear], dict[str, str]]:
    """The linears to quantise, and those left with the reason; checks model, disk and memory.

    Raises:
        InputError, UnsupportedModelError, ResourceError: as ``quantize``.
    """
    _require_quantizable(source, scheme.bits)
    skeleton = build_skeleton(source.config, split=())
    linears, left = choose_schemes(skeleton, scheme, skip)
    schemes = {f"{linear.name}.weight": linear.scheme for linear in linears}
    needed = quantized_bytes(stored_tensors(source, skeleton), schemes, num_files=1)
    output.require_disk(needed, "the weights need")
    if place.type == "cpu":  # on a GPU the weights do not stay in memory
        require_memory(needed, "The quantised weights need", place)
    return linears, left


def _warn_of_elastic_files(source: Source, reporter: Reporter) -> None:
    if source.folder is not None and any(source.folder.glob(f"{ELASTIC_STEM}*")):
        reporter.warn("The smaller sizes of this elastic checkpoint are not carried over; slice before you quantise.")


def _round_and_write(
    model: str | Path,
    partial: Path,
    source: Source,
    linears: Sequence[QuantizedLinear],
    place: torch.device,
    options: dict[str, Any],
    reporter: Reporter,
) -> None:
    """Loads the model with quantised linears and writes its weights; ``options`` are those of ``from_pretrained``."""
    with reporter.stage("quantise", 1):
        if place.type != "cpu":
            options = options | {"device_map": {"": str(place)}}
        loaded = load_model(model, dtype=source.dtype, quantization_config=quantization_config(linears), **options)
    with reporter.stage("write", 1):
        _write(loaded, partial, source)


def _require_quantizable(source: Source, bits: int) -> None:
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
    require_dtype(bits, source.dtype, source.name)


def _write(loaded: PreTrainedModel, folder: Path, source: Source) -> None:
    loaded.generation_config = GenerationConfig()  # that of the source is copied as a file, since saving may refuse it
    loaded.save_pretrained(folder, max_shard_size=SHARD_BYTES, save_original_format=False)
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert source.folder is not None
    copy_companion_files(source.folder, folder)
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)  # save_pretrained makes them readable by their owner only


def _finish(
    checkpoint: Path, partial: Path, result: QuantizationResult, place: torch.device, reporter: Reporter
) -> None:
    """Recipe, report, card, reference logits and hashes of a checkpoint that was quantised."""
    text, settings = settings_of_copy(checkpoint / RECIPE_FILE)
    report = _report(checkpoint, result) | {"recipe": settings}
    finish_checkpoint(partial, text, report, place, reporter)


def _report(folder: Path, result: QuantizationResult) -> dict[str, Any]:
    """The report of a checkpoint, brought up to date with its quantisation."""
    import torchao

    report = read_report(folder)
    report["quantization"] = {
        "bits": result.bits,
        "group_size": result.group_size,
        "by_scheme": result.by_scheme(),
        "other_schemes": {linear.name: linear.reason for linear in result.linears if linear.reason},
        "left": result.left,
        "unquantized_file_bytes": report["file_bytes"],
        "versions": {"svdllm": __version__, "torch": torch.__version__, "torchao": torchao.__version__},
    }
    return report | {"file_bytes": result.bytes_after, "elastic_bytes": 0, "quantized_file_bytes": None}
