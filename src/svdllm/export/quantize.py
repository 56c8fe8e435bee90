"""A model in fewer bits: the factors (or dense linears) stored in 8 or 4 bits each by torchao, in a folder like any other."""

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
from svdllm.checkpoint.output import new_folder
from svdllm.checkpoint.quantized import (
    QuantizedLinear,
    choose_schemes,
    make_scheme,
    quantization_config,
    quantized_tensors,
    require_dtype,
)
from svdllm.checkpoint.report import REPORT_FILE, is_checkpoint, read_report
from svdllm.checkpoint.tensors import SHARD_BYTES, stored_tensors, tensor_bytes
from svdllm.checkpoint.weight_sizes import weight_bytes
from svdllm.common.device import resolve_device
from svdllm.common.errors import InputError, ResourceError
from svdllm.common.extras import require_extra
from svdllm.common.memory import available_bytes
from svdllm.common.progress import Reporter
from svdllm.common.version import __version__
from svdllm.compression.recipe import load_settings, make_recipe
from svdllm.models.companions import copy_companion_files
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.open import Source, open_config
from svdllm.models.skeleton import build_skeleton


@dataclass(frozen=True, kw_only=True)
class QuantizationResult:
    """What was written. Sizes in bytes of weight files."""

    output_dir: Path
    model: str
    bits: int
    group_size: int | None
    linears: list[QuantizedLinear]
    left: dict[str, str]  # linears and embeddings that are as they were, and why
    bytes_before: int
    bytes_after: int
    seconds: dict[str, float]

    def by_scheme(self) -> dict[str, int]:
        """How many linears have each scheme."""
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
    """Stores the linears of a model's blocks in few bits, and writes a folder that ``from_pretrained`` loads.

    Of a checkpoint of this library, report, recipe, card and hashes are carried over; of a dense model, weights and
    tokenizer. Embeddings, ``lm_head``, norms and biases are left in their dtype.

    Args:
        model: a checkpoint, or a dense model (folder or hub id).
        output_dir: made by this call; must not exist, or be empty.
        bits: 8, symmetric integers; or 4, NVFP4 (numbers of four bits, a scale of eight for every 16). A linear whose
            shape is not in groups gets 8 bits and a scale per row.
        group_size: inputs that share a scale, with 8 bits; by default all of a row.
        skip: regular expressions of linears that are left as they are.
        device: where the weights are rounded: auto, cpu, cuda, ...
        offline, revision: of a hub id.
        reporter: is told about stages.

    Raises:
        InputError: torchao is missing, an option is wrong, or the output exists; nothing is left behind.
        UnsupportedModelError: the model is quantised already, or of no kind that can be.
        ResourceError: memory or disk does not suffice.
        CheckpointError: a file is missing or altered.
    """
    reporter = reporter or Reporter()
    require_extra("torchao", "quantising", extra="quantize")
    scheme = make_scheme(bits, group_size)
    with new_folder(output_dir, "a run") as (output, partial):
        with reporter.stage("check", 1):
            source = open_config(model, offline=offline, revision=revision)
            place = resolve_device(device)
            _require_quantizable(source, bits)
            skeleton = build_skeleton(source.config)
            linears, left = choose_schemes(skeleton, scheme, skip)
            needed = tensor_bytes(quantized_tensors(stored_tensors(source, skeleton), linears))
            output.require_disk(needed, "the weights need")
            _require_memory(needed, place)
        if source.folder is not None and any(source.folder.glob(f"{ELASTIC_STEM}*")):
            reporter.warn(
                "The smaller sizes of this elastic checkpoint are not carried over; slice before you quantise."
            )
        with reporter.stage("quantise", 1):
            options: dict[str, Any] = {} if place.type == "cpu" else {"device_map": {"": str(place)}}
            if revision is not None:
                options["revision"] = revision
            loaded = load_model(
                model,
                dtype=source.dtype,
                quantization_config=quantization_config(linears),
                local_files_only=offline,
                **options,
            )
        with reporter.stage("write", 1):
            _write(loaded, partial, source)
            del loaded
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
                recipe = make_recipe(load_settings(source.folder / RECIPE_FILE) | {"elastic": False})
                report = _report(source.folder, result) | {"recipe": recipe.to_dict()}
                finish_checkpoint(partial, recipe.to_yaml(), report, place, reporter)
    return result


def _require_quantizable(source: Source, bits: int) -> None:
    if source.gguf is not None:
        raise InputError(
            f"{source.gguf} is a GGUF file, whose weights are in few bits already. Quantise a folder of safetensors."
        )
    assert source.folder is not None
    if LowRankInfo.of(source.config) and not is_checkpoint(source.folder):
        raise InputError(
            f"{source.name} is a compressed model without {REPORT_FILE}; of a checkpoint on the hub, download the whole "
            "repository first."
        )
    require_dtype(bits, source.dtype, source.name)


def _require_memory(needed: int, place: torch.device) -> None:
    """Raises ResourceError unless the memory holds the result, where the weights are rounded there."""
    memory = available_bytes()
    if place.type == "cpu" and memory is not None and needed > memory:
        raise ResourceError(
            f"The quantised weights need {needed / 1e9:.2f} GB of memory, {memory / 1e9:.2f} GB are free."
        )


def _write(loaded: PreTrainedModel, folder: Path, source: Source) -> None:
    loaded.generation_config = GenerationConfig()  # the source's file is copied; saving may refuse what is in it
    loaded.save_pretrained(folder, max_shard_size=SHARD_BYTES, save_original_format=False)
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert source.folder is not None
    copy_companion_files(source.folder, folder)
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)  # the library makes them readable by their owner only


def _report(folder: Path, result: QuantizationResult) -> dict[str, Any]:
    """The report of the checkpoint with what quantisation changed in it."""
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
