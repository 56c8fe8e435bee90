"""Writes tensors as safetensors files of bounded size, with an index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from svdllm.checkpoint.tensors import SHARD_BYTES, Tensors, shard_names, tensor_bytes
from svdllm.common.files import save_tensors


def write_shards(folder: Path, tensors: Any, layout: Tensors, stem: str = "model") -> None:
    """Writes safetensors files of at most ``SHARD_BYTES`` and, if there are several, their index.

    A pair of factors is not parted, whatever its size.
    """
    shards = shard_names(layout, SHARD_BYTES)
    index: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        save_tensors({name: tensors.get(name).cpu().contiguous() for name in names}, folder / file)
        index.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        content = {"metadata": {"total_size": tensor_bytes(layout)}, "weight_map": dict(sorted(index.items()))}
        (folder / f"{stem}.safetensors.index.json").write_text(
            json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
