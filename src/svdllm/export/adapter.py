"""Writes corrections beside a plain model in few bits: as an adapter of PEFT, or by the names of ModelOpt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from svdllm.checkpoint.integers import integer_config
from svdllm.checkpoint.output import new_folder
from svdllm.checkpoint.shards import write_shards
from svdllm.checkpoint.tensors import Tensors, tensor_bytes
from svdllm.common.errors import InputError, UnsupportedModelError
from svdllm.common.files import save_tensors
from svdllm.export.copies import require_intact
from svdllm.models.companions import copy_companion_files
from svdllm.models.config_files import ADAPTER_FILE, load_config
from svdllm.models.low_rank.factory import dense_config
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.low_rank.lowrank import unpacked
from svdllm.models.safetensors_files import weight_files

BASE_FOLDER = "base"


@dataclass(frozen=True, kw_only=True)
class CorrectionNames:
    """How a tool names the two matrices of a correction.

    Args:
        file: that holds them.
        matrices: module of a corrected linear (``svd_v``, rank x in; ``svd_u``, out x rank) -> name of its matrix, in
            which ``{}`` stands for the linear.
    """

    file: str
    matrices: Mapping[str, str]


PEFT = CorrectionNames(
    file="adapter/adapter_model.safetensors",
    matrices={
        "svd_v": "base_model.model.{}.lora_A.weight",
        "svd_u": "base_model.model.{}.lora_B.weight",
    },
)
# In the quantiser of every weight, added to what the quantised weight computes (SVDQuant, arXiv 2411.05007).
MODELOPT = CorrectionNames(
    file="svdquant.safetensors",
    matrices={
        "svd_v": "{}.weight_quantizer.svdquant_lora_a",
        "svd_u": "{}.weight_quantizer.svdquant_lora_b",
    },
)


@dataclass(frozen=True, kw_only=True)
class AdapterExport:
    """What was written: number of corrected linears, their largest rank, and bytes of weights."""

    linears: int
    rank: int
    base_bytes: int
    adapter_bytes: int


def export_adapter(folder: str | Path, output_dir: str | Path, names: CorrectionNames = PEFT) -> AdapterExport:
    """Writes ``base``, a model of the family in few bits, and beside it the corrections of its linears.

    By the names ``PEFT`` they are an adapter, which PEFT and vLLM load on top of the base; by ``MODELOPT`` a file of
    ``svdquant_lora_a`` (rank x in) and ``svdquant_lora_b`` (out x rank). Both are in the dtype of their scales.

    Raises:
        InputError: the folder has no corrections, or ``output_dir`` is not empty.
        UnsupportedModelError: it has linears in other forms of low rank, or an embedding in few bits.
        CheckpointError: a file is truncated or altered.
        ResourceError: the disk is too small.
    """
    folder = Path(folder)
    config = load_config(folder, str(folder), allow_quantized=True)
    info = _require_corrections(folder, LowRankInfo.of(config))
    with new_folder(output_dir, "an export") as (output, partial):
        require_intact(folder)
        base, adapter = _Parts.of(folder, info, names)
        output.require_disk(tensor_bytes(base.layout) + tensor_bytes(adapter.layout), "the weights need")
        (partial / BASE_FOLDER).mkdir()
        write_shards(partial / BASE_FOLDER, base, base.layout)
        _write_config(partial / BASE_FOLDER, dense_config(config), base)
        copy_companion_files(folder, partial / BASE_FOLDER)
        weights = {name: adapter.get(name) for name in adapter.layout}
        file = partial / names.file
        file.parent.mkdir(exist_ok=True)
        save_tensors(weights, file)
        ranks = {name: int(entry["rank"]) for name, entry in info.forms.items()}
        if names is PEFT:
            _write_adapter_config(file.parent, ranks)
        return AdapterExport(
            linears=len(ranks),
            rank=max(ranks.values()),
            base_bytes=tensor_bytes(base.layout),
            adapter_bytes=tensor_bytes(adapter.layout),
        )


def _require_corrections(folder: Path, info: LowRankInfo | None) -> LowRankInfo:
    if info is None or not any(entry["form"] == "corrected" for entry in info.forms.values()):
        raise InputError(
            f"{folder} has no linears with corrections, so there is nothing to write as an adapter. Compress with "
            "--forms int4,int4-corrected."
        )
    others = sorted({str(entry["form"]) for entry in info.forms.values()} - {"corrected"})
    if others:
        raise UnsupportedModelError(
            f"{folder} has linears in other forms ({', '.join(others)}), which a plain model does not have. Compress "
            "with --forms int4,int4-corrected."
        )
    if info.embeddings:
        raise UnsupportedModelError(
            f"{folder} has an embedding in few bits, which a plain model does not have. Compress with --ignore "
            f"{next(iter(info.embeddings))}."
        )
    return info


class _Parts:
    """Some tensors of a checkpoint under other names, made when they are asked for.

    groups: (bits, group size) -> the modules that are stored so.
    """

    def __init__(self) -> None:
        self.layout: Tensors = {}
        self.groups: dict[tuple[int, int | None], list[str]] = {}
        self._sources: dict[str, tuple[Path, str]] = {}
        self._factors: dict[str, tuple[int, int]] = {}  # name -> bits and columns

    @classmethod
    def of(cls, folder: Path, info: LowRankInfo, names: CorrectionNames) -> tuple[_Parts, _Parts]:
        """The tensors of the base model and of the adapter."""
        base, adapter = cls(), cls()
        for path, key, tensor in _tensors(folder):
            module, _, leaf = key.rpartition(".")
            owner, _, part = module.rpartition(".")
            if owner in info.forms and part in names.matrices:
                if leaf == "weight_shape":
                    adapter._add_factor(path, module, names.matrices[part].format(owner), tensor)
                continue
            name = f"{owner}.{leaf}" if owner in info.forms else key
            base.layout[name] = (tuple(tensor.shape), tensor.dtype)
            base._sources[name] = (path, key)
            if leaf == "weight_shape":
                bits, groups = _scheme(path, module, int(tensor[1]))
                size = int(tensor[1]) // groups
                base.groups.setdefault((bits, size), []).append(name.removesuffix(".weight_shape"))
        return base, adapter

    def _add_factor(self, path: Path, module: str, name: str, shape: Tensor) -> None:
        rows, columns = map(int, shape)
        with safe_open(path, framework="pt") as file:
            dtype = file.get_tensor(f"{module}.weight_scale").dtype
        self.layout[name] = ((rows, columns), dtype)
        self._sources[name] = (path, module)
        self._factors[name] = (_scheme(path, module, columns)[0], columns)

    def get(self, name: str) -> Tensor:
        path, key = self._sources[name]
        with safe_open(path, framework="pt") as file:
            if name not in self._factors:
                return file.get_tensor(key)
            return unpacked(
                file.get_tensor(f"{key}.weight_packed"), file.get_tensor(f"{key}.weight_scale"), *self._factors[name]
            )


def _tensors(folder: Path) -> Iterator[tuple[Path, str, Tensor]]:
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                yield path, key, file.get_tensor(key)


def _scheme(path: Path, module: str, columns: int) -> tuple[int, int]:
    """Bits of the codes of a module, and groups of a row."""
    with safe_open(path, framework="pt") as file:
        width = file.get_slice(f"{module}.weight_packed").get_shape()[1]
        groups = file.get_slice(f"{module}.weight_scale").get_shape()[1]
    return width * 32 // columns, groups


def _write_config(folder: Path, config: PreTrainedConfig, base: _Parts) -> None:
    config.quantization_config = integer_config(base.groups)
    config.save_pretrained(folder)


def _write_adapter_config(folder: Path, ranks: dict[str, int]) -> None:
    """Writes the config of a LoRA whose scale is 1 for every rank."""
    most = max(ranks.values())
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": f"../{BASE_FOLDER}",
        "r": most,
        "lora_alpha": most,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != most},
        "alpha_pattern": {name: rank for name, rank in ranks.items() if rank != most},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / ADAPTER_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
