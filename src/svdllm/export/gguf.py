"""Writes a model without low rank as a GGUF file, for llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

from svdllm.checkpoint.load import load_model
from svdllm.common.errors import InputError, NumericalError, UnsupportedModelError
from svdllm.common.extras import require_extra
from svdllm.export.copies import require_intact
from svdllm.export.gguf_blocks import BLOCK, block_type, blocks_of
from svdllm.export.gguf_metadata import INTERLEAVED_ROTARY, add_config, add_tokenizer, architecture_of
from svdllm.models.config_files import load_config
from svdllm.models.logits import compare_logits, full_precision
from svdllm.models.low_rank.factory import dense_config
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.low_rank.lowrank import unpacked
from svdllm.models.safetensors_files import weight_files
from svdllm.models.skeleton import build_skeleton

# Codes of a linear, and of an embedding -> their scales.
PACKED = {"weight_packed": "weight_scale", "packed_codes": "packed_scales"}


@dataclass(frozen=True, kw_only=True)
class GgufExport:
    """What was written: number of tensors by their type, and bytes of the file."""

    types: dict[str, int]
    bytes: int
    difference: float  # of the logits, as a share of the largest


def export_gguf(folder: str | Path, output: str | Path) -> GgufExport:
    """Writes a dense or quantised model as one GGUF file, and compares its logits with those of the folder.

    Integers keep their values and get the type of GGUF that holds them; matrices in the source's dtype keep it.

    Raises:
        InputError: there is no model in the folder, or the file exists.
        UnsupportedModelError: some linears are factors, or the architecture or the tokenizer is not known.
        CheckpointError: a file is truncated or altered.
        NumericalError: the file computes other logits; it is removed.
    """
    require_extra("gguf", "writing GGUF files", extra="gguf")
    folder, output = Path(folder), Path(output)
    config = load_config(folder, str(folder), allow_quantized=True)
    _refuse_low_rank(LowRankInfo.of(config), folder)
    plain = dense_config(config)
    architecture = architecture_of(plain)
    if output.exists():
        raise InputError(f"{output} exists already; give the name of a new file.")
    require_intact(folder)
    try:
        types = _write(folder, output, plain, architecture)
        difference = _difference(folder, output)
    except BaseException:
        output.unlink(missing_ok=True)
        raise
    return GgufExport(types=types, bytes=output.stat().st_size, difference=difference)


def _refuse_low_rank(info: LowRankInfo | None, folder: Path) -> None:
    if info is not None and info.forms:
        forms = sorted({str(entry["form"]) for entry in info.forms.values()})
        raise UnsupportedModelError(
            f"{folder} has {len(info.forms)} linears in forms that GGUF does not have ({', '.join(forms)}): all that "
            "they save would be lost, because they would be multiplied out to matrices of the original size. If that "
            "is wanted, use `svdllm export --format dense` and then this export on its result; for a small file, "
            "compress with --runtime llama.cpp."
        )


def _write(folder: Path, output: Path, config: PreTrainedConfig, architecture: str) -> dict[str, int]:
    from gguf import GGUFWriter

    writer = GGUFWriter(output, architecture)
    writer.add_name(folder.name)
    add_config(writer, config, architecture)
    add_tokenizer(writer, folder, config)
    skeleton = build_skeleton(config)
    places = get_gguf_hf_weights_map(skeleton, TensorProcessor(config=config.to_dict()))
    names = {theirs: ours for ours, theirs in places.items()}
    types: dict[str, int] = {}
    for name, stored in _stored(folder):
        if name not in names:
            raise UnsupportedModelError(f"GGUF has no place for {name} of a model of type {config.model_type}.")
        heads = _heads_of(names[name], config) if architecture in INTERLEAVED_ROTARY else None
        data, kind = _encoded(name, stored, tuple(skeleton.get_parameter(name).shape), heads)
        writer.add_tensor(names[name], data, raw_dtype=kind)
        types[kind.name] = types.get(kind.name, 0) + 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return types


def _stored(folder: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yields every parameter with the tensors that it is stored as: itself, or integers and scales."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            for key in sorted(keys):
                owner, _, leaf = key.rpartition(".")
                if leaf in PACKED:
                    parts = {"packed": key, "scale": f"{owner}.{PACKED[leaf]}"}
                    yield f"{owner}.weight", {part: file.get_tensor(name) for part, name in parts.items()}
                elif leaf not in (*PACKED.values(), "weight_shape"):
                    yield key, {"": file.get_tensor(key)}


def _encoded(name: str, stored: dict[str, Tensor], shape: tuple[int, ...], heads: int | None) -> tuple[Any, Any]:
    """The bytes of a parameter of a shape, and their type."""
    from gguf import GGMLQuantizationType as Type
    from gguf.quants import quantize

    if "packed" not in stored:
        tensor = _interleaved(stored[""], heads)
        kind = {torch.float16: Type.F16, torch.bfloat16: Type.BF16}.get(tensor.dtype, Type.F32)
        kind = Type.F32 if tensor.ndim == 1 else kind
        return quantize(tensor.float().contiguous().numpy(), kind), kind
    packed, scales = _interleaved(stored["packed"], heads), _interleaved(stored["scale"], heads)
    columns = shape[1]
    if columns % (BLOCK * scales.shape[1]):
        raise UnsupportedModelError(
            f"{name} has a scale for every {columns // scales.shape[1]} inputs, and GGUF has one for every {BLOCK}. "
            "Compress with --runtime llama.cpp."
        )
    bits = packed.shape[1] * 32 // columns
    codes = unpacked(packed, torch.ones(len(packed), 1), bits, columns)
    return blocks_of(codes.to(torch.int8).numpy(), scales.float().numpy(), bits), block_type(bits)


def _interleaved(rows: Tensor, heads: int | None) -> Tensor:
    """Puts the two halves of the rows of every head one into the other; nothing without heads."""
    if heads is None:
        return rows
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _heads_of(name: str, config: PreTrainedConfig) -> int | None:
    """The number of heads of a query or key projection, by its name in GGUF; None for others."""
    if ".attn_q." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".attn_k." in name else None


def _difference(folder: Path, output: Path) -> float:
    """The difference of the logits of a few tokens: what float16 makes of the scales."""
    model, found = (load_model(place, dtype=torch.float32) for place in (folder, output))
    ids = torch.arange(16)[None] * 7919 % model.config.vocab_size
    with torch.no_grad(), full_precision():
        expected, logits = (each.eval()(input_ids=ids, use_cache=False).logits for each in (model, found))
    return compare_logits(
        logits, expected, lambda how: NumericalError(f"{output} does not compute what {folder} does: {how}.")
    )
