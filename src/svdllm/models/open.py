"""Opens a model without loading it: a hub id, a local folder, a GGUF file or a model in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from svdllm.common.errors import InputError
from svdllm.models.config_files import check_quantization, is_quantized, load_config, require_causal_lm
from svdllm.models.hub import hub_folder
from svdllm.models.low_rank.lowrank import weight_file_names
from svdllm.models.model_names import display_name, snapshot_commit
from svdllm.models.quantized_sources.methods import QuantizedSource, quantization_of
from svdllm.models.safetensors_files import holds_weights
from svdllm.models.skeleton import build_skeleton
from svdllm.models.tokenizer_files import load_tokenizer
from svdllm.models.unused_tensors import UnusedTensors, warn_of_unused
from svdllm.models.weights import MemoryWeights, SafetensorsWeights, Weights


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened model.

    folder: has the companion files; None for a model in memory, or a GGUF file that was not converted.
    weights: None where only the config was read.
    unused: the tensors in the files that the model does not use, as far as known.
    """

    name: str
    revision: str | None
    config: PreTrainedConfig
    folder: Path | None
    weights: Weights | None
    model: PreTrainedModel | None = None
    gguf: Path | None = None
    unused: UnusedTensors | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of most of the weights."""
        if self.weights is not None:
            sizes: dict[torch.dtype, int] = {}
            for name in self.weights.names():
                shape, dtype = self.weights.shape_and_dtype(name)
                if dtype.is_floating_point:
                    sizes[dtype] = sizes.get(dtype, 0) + torch.Size(shape).numel()
            return max(sizes, key=lambda dtype: sizes[dtype])
        return self.config.dtype or torch.float32  # type: ignore[return-value]

    @property
    def weight_bytes(self) -> int:
        """Size of the weight files; 0 where only the config is known."""
        if self.gguf is not None:
            return self.gguf.stat().st_size
        files = [] if self.folder is None else [self.folder / name for name in weight_file_names(self.folder)]
        return sum(path.stat().st_size for path in files if path.is_file())

    @property
    def quantization(self) -> QuantizedSource | None:
        """How the weight files are quantised, where they are dequantised on reading."""
        found = None if self.folder is None else quantization_of(self.folder)
        if found is None:
            return None
        dtype = str(found.dtype).removeprefix("torch.")
        return QuantizedSource(found.method.title, dtype, self.weight_bytes or None)

    @property
    def rounded_by(self) -> str | None:
        """What rounded the weights from those of an original model; None for a form that models are published in."""
        if self.gguf is not None:
            from svdllm.models.gguf import GgufFile

            return GgufFile(self.gguf).quantized_as
        found = None if self.folder is None else quantization_of(self.folder)
        return found.method.title if found is not None and found.after_training else None

    def load_tokenizer(self, offline: bool = False) -> Any:
        """Loads the tokenizer beside the weights; see ``svdllm.models.tokenizer_files``."""
        return load_tokenizer(self.name, self.folder, self.gguf, offline=offline)


def open_source(
    model: str | Path | PreTrainedModel,
    *,
    offline: bool = False,
    revision: str | None = None,
    gguf_folder: Path | None = None,
) -> Source:
    """Opens a model without loading it.

    Args:
        model: hub id, folder, GGUF file, or a model in memory.
        offline: never ask the hub; its local cache is used.
        revision: branch, tag or commit of a hub id.
        gguf_folder: the folder to dequantise a GGUF file into; without it only its config is read.

    Raises:
        InputError: no such model, or files missing from it.
        UnsupportedModelError: not a causal language model, or weights in a form that cannot be read.
    """
    if isinstance(model, PreTrainedModel):
        require_causal_lm(model.config, type(model).__name__)
        check_quantization(model.config, type(model).__name__, allowed=False)
        name = getattr(model, "name_or_path", "") or type(model).__name__
        weights = MemoryWeights(model, build_skeleton(model.config))
        return Source(
            name=display_name(name),
            revision=None,
            config=model.config,
            folder=None,
            weights=weights,
            model=model,
            unused=weights.unused,
        )
    text = _as_text(model)
    if Path(text).is_file():
        return _open_gguf(Path(text), gguf_folder)
    folder = Path(text) if Path(text).is_dir() else hub_folder(text, revision, offline, weights=True)
    config = load_config(folder, name=text)
    weights = SafetensorsWeights(folder, build_skeleton(config))
    return Source(
        name=display_name(text),
        revision=snapshot_commit(folder),
        config=config,
        folder=folder,
        weights=weights,
        unused=weights.unused,
    )


def open_config(
    model: str | Path | PreTrainedModel,
    *,
    offline: bool = False,
    revision: str | None = None,
    allow_quantized: bool = False,
    require_weights: bool = True,
) -> Source:
    """Opens a model like ``open_source``, but reads no weights; only the config of a hub id is fetched.

    Args:
        allow_quantized: accept a model too that is quantised in a way that cannot be dequantised on reading; it can be
            run but not changed.
        require_weights: refuse a folder that holds no weights.
    """
    text = "" if isinstance(model, PreTrainedModel) else _as_text(model)
    if Path(text).is_file():
        return _open_gguf(Path(text), None)
    is_folder = Path(text).is_dir()
    config_alone = is_folder and (
        (allow_quantized and is_quantized(Path(text))) or not (require_weights or holds_weights(Path(text)))
    )
    if isinstance(model, PreTrainedModel) or (is_folder and not config_alone):
        return open_source(model, offline=offline)
    folder = Path(text) if is_folder else hub_folder(text, revision, offline, weights=False)
    config = load_config(folder, name=text, allow_quantized=allow_quantized)
    return Source(name=display_name(text), revision=snapshot_commit(folder), config=config, folder=folder, weights=None)


def _open_gguf(path: Path, folder: Path | None) -> Source:
    if path.suffix.lower() != ".gguf":
        raise InputError(f"{path} is a file, but not a .gguf file. Expected a hub id, a model folder or a GGUF file.")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise InputError("Reading GGUF files needs the gguf package: pip install 'svdllm[gguf]'.") from error
    from svdllm.models.gguf import GgufFile, convert_gguf

    file = GgufFile(path)
    config = file.config()
    require_causal_lm(config, path.name)
    unused = file.unused(build_skeleton(config, split=()))
    warn_of_unused(path.name, unused)
    weights = None
    if folder is not None:
        convert_gguf(path, config, folder)
        weights = SafetensorsWeights(folder, build_skeleton(config))
    return Source(
        name=path.stem, revision=None, config=config, folder=folder, weights=weights, gguf=path, unused=unused
    )


def _as_text(model: Any) -> str:
    if not isinstance(model, str | Path):
        raise InputError(
            f"A model is a hub id, a path or a transformers PreTrainedModel, found {type(model).__name__}. Of a model "
            "with an adapter, merge the adapter first (merge_and_unload)."
        )
    return str(model)
