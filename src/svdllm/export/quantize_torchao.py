"""Quantises the linears of a model with torchao, whose forms stay packed in memory and have kernels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from svdllm.checkpoint.load import load_model
from svdllm.checkpoint.quantized import (
    QuantizedLinear,
    Scheme,
    make_scheme,
    quantization_config,
    quantized_bytes,
    require_dtype,
)
from svdllm.checkpoint.tensors import SHARD_BYTES, Tensors
from svdllm.export.quantize_job import QuantizeFormat, QuantizeJob
from svdllm.models.companions import copy_companion_files
from svdllm.models.open import Source


def _require(source: Source, bits: int) -> None:
    require_dtype(bits, source.dtype, source.name)


def _num_bytes(tensors: Tensors, linears: Sequence[QuantizedLinear[Scheme]]) -> int:
    return quantized_bytes(tensors, {f"{linear.name}.weight": linear.scheme for linear in linears}, num_files=1)


def _write(job: QuantizeJob) -> None:
    """Loads the model with quantised linears and writes its weights."""
    options: dict[str, Any] = {"local_files_only": job.options.offline}
    if job.options.revision is not None:
        options["revision"] = job.options.revision
    if job.place.type != "cpu":
        options["device_map"] = {"": str(job.place)}
    config = quantization_config(job.linears)
    loaded = load_model(job.model, dtype=job.source.dtype, quantization_config=config, **options)
    _save(loaded, job.folder, job.source)


def _save(loaded: PreTrainedModel, folder: Path, source: Source) -> None:
    loaded.generation_config = GenerationConfig()  # that of the source is copied as a file, since saving may refuse it
    loaded.save_pretrained(folder, max_shard_size=SHARD_BYTES, save_original_format=False)
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert source.folder is not None
    copy_companion_files(source.folder, folder)
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)  # save_pretrained makes them readable by their owner only


TORCHAO = QuantizeFormat(
    name="torchao",
    summary="8-bit integers, or NVFP4 as 4 bits; packed in memory too, with kernels",
    package="torchao",
    scheme=make_scheme,
    require=_require,
    num_bytes=_num_bytes,
    in_memory=True,
    write=_write,
)
