"""Where a model comes from: a hub id, a local folder, a GGUF file or a model in memory; its weights, one at a time.

Tensors go by the names they have in the model's own ``state_dict``, whatever the file calls them.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from svdllm.errors import CheckpointError, InputError, NumericalError, UnsupportedModelError

# What belongs to a model beside its weights and its config, and is copied as it is.
COMPANION_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
)
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Weights(Protocol):
    """The tensors of a model by their name in its ``state_dict``; tied tensors are there once."""

    def names(self) -> list[str]: ...

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]: ...

    def get(self, name: str) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to read from. ``folder`` holds its companion files; ``weights`` is None where only the config is known."""

    name: str
    revision: str | None
    config: PreTrainedConfig
    folder: Path | None
    weights: Weights | None
    model: PreTrainedModel | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that holds most of the weights."""
        if self.weights is not None:
            sizes: dict[torch.dtype, int] = {}
            for name in self.weights.names():
                shape, dtype = self.weights.shape_and_dtype(name)
                if dtype.is_floating_point:
                    sizes[dtype] = sizes.get(dtype, 0) + torch.Size(shape).numel()
            return max(sizes, key=lambda dtype: sizes[dtype])
        return self.config.dtype or torch.float32  # type: ignore[return-value]

    def load_tokenizer(self, offline: bool = False) -> Any:
        """The tokenizer beside the weights."""
        try:
            return AutoTokenizer.from_pretrained(str(self.folder), local_files_only=offline)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise InputError(
                f"{self.name} has no tokenizer that transformers can load ({_first_line(error)}). Put its tokenizer "
                "files beside the weights, or pass token ids from Python."
            ) from error


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
        gguf_folder: where a GGUF file is dequantised to; without it only the config of such a file is opened.

    Raises:
        InputError: no such model, or files missing from it.
        UnsupportedModelError: not a causal language model, or weights in a form that cannot be read.
    """
    if isinstance(model, PreTrainedModel):
        require_causal_lm(model.config, type(model).__name__)
        name = getattr(model, "name_or_path", "") or type(model).__name__
        return Source(
            name=_display_name(name),
            revision=None,
            config=model.config,
            folder=None,
            weights=MemoryWeights(model),
            model=model,
        )
    text = str(model)
    if Path(text).is_file():
        return _open_gguf(Path(text), gguf_folder)
    folder = Path(text) if Path(text).is_dir() else _from_hub(text, revision, offline, weights=True)
    config = load_config(folder, name=text)
    weights = SafetensorsWeights(folder, build_skeleton(config))
    return Source(name=_display_name(text), revision=_revision(folder), config=config, folder=folder, weights=weights)


def open_config(model: str | Path | PreTrainedModel, *, offline: bool = False, revision: str | None = None) -> Source:
    """Like ``open_source``, but reads no weights: of a hub id, only its config is fetched."""
    text = "" if isinstance(model, PreTrainedModel) else str(model)
    if isinstance(model, PreTrainedModel) or Path(text).is_dir():
        return open_source(model, offline=offline)
    if Path(text).is_file():
        return _open_gguf(Path(text), None)
    folder = _from_hub(text, revision, offline, weights=False)
    config = load_config(folder, name=text)
    return Source(name=text, revision=_revision(folder), config=config, folder=folder, weights=None)


def load_config(folder: Path, name: str) -> PreTrainedConfig:
    """The config of a folder, which must be a causal language model's."""
    if not (folder / "config.json").is_file():
        found = sorted(path.name for path in folder.iterdir())[:6]
        raise InputError(
            f"{name} is no model folder: it has no config.json (found {', '.join(found) or 'nothing'}). Expected a "
            "folder as written by save_pretrained."
        )
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnsupportedModelError(
            f"The config of {name} cannot be read by transformers: {_first_line(error)}"
        ) from error
    require_causal_lm(config, name)
    return config


def require_causal_lm(config: PreTrainedConfig, name: str) -> None:
    """Raises UnsupportedModelError unless the config is a decoder-only language model's, not quantised."""
    family = getattr(config, "svdllm", None) and config.svdllm["base_model_type"]
    model_type = family or config.model_type
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    architectures = config.architectures or []
    if expected is None or config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{name} is not a causal language model: its model_type is {model_type!r}"
            f"{f' ({architectures[0]})' if architectures else ''}, for which transformers has no decoder-only "
            "language model. Expected something like llama, qwen2 or gpt2."
        )
    known = {expected, *([] if family is None else architectures)}
    if architectures and not known.intersection(architectures):
        raise UnsupportedModelError(
            f"{name} is not a causal language model: its architecture is {architectures[0]}, expected {expected}."
        )
    if getattr(config, "quantization_config", None):
        method = dict(config.quantization_config).get("quant_method", "unknown")
        raise UnsupportedModelError(
            f"{name} is quantised ({method}). Compress the unquantised model, then quantise the result."
        )


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model on the meta device, buffers real (rotary tables are computed in the constructor)."""
    with init_empty_weights(include_buffers=False):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return skeleton.eval().requires_grad_(False)


def survey(weights: Weights, progress: Callable[[int, int], None] | None = None) -> str:
    """Reads every tensor once: the fingerprint of their names, dtypes, shapes and bytes.

    Raises:
        NumericalError: a weight is NaN or infinite; names the tensor.
    """
    digest = hashlib.sha256()
    names = weights.names()
    for done, name in enumerate(names):
        tensor = weights.get(name).detach().cpu().contiguous()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise NumericalError(
                f"The weights are damaged: {name} has {bad} values of {tensor.numel()} that are NaN or infinite."
            )
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
        if progress is not None:
            progress(done + 1, len(names))
    return digest.hexdigest()


class SafetensorsWeights:
    """The safetensors files of a folder; nothing is held open or in memory between two reads.

    Raises:
        CheckpointError: a file is missing or truncated, or a tensor of the model is in none of them.
        UnsupportedModelError: there are only pickled weights, or tensors in a layout that needs converting.
    """

    def __init__(self, folder: Path, skeleton: PreTrainedModel):
        self._place: dict[str, tuple[Path, str, tuple[int, ...], torch.dtype]] = {}
        renaming = _renaming(skeleton)
        expected = skeleton.state_dict()
        self.unused: list[str] = []
        for path in _weight_files(folder):
            for key, shape, dtype in _header(path):
                name = renaming(key)
                if name in expected:
                    self._place[name] = (path, key, shape, dtype)
                else:
                    self.unused.append(key)
        self._check(folder, skeleton, expected)

    def names(self) -> list[str]:
        return list(self._place)

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return self._place[name][2:]

    def get(self, name: str) -> Tensor:
        path, key, *_ = self._place[name]
        # A copy, so that the mapping of the file (which counts as resident memory) ends with this call.
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(key).clone()

    def _check(self, folder: Path, skeleton: PreTrainedModel, expected: dict[str, Tensor]) -> None:
        # A tied tensor is written once, under whichever of its names; the others come from tie_weights.
        stored_storage = {id(expected[name]) for name in self._place}
        tied = set(getattr(skeleton, "all_tied_weights_keys", None) or ())
        missing = [
            n for n in expected if n not in self._place and n not in tied and id(expected[n]) not in stored_storage
        ]
        if missing:
            raise CheckpointError(
                f"{folder.name}: {len(missing)} tensors of {type(skeleton).__name__} are in none of its safetensors "
                f"files, for instance {', '.join(missing[:3])}"
                f"{f'; unknown there: {self.unused[0]}' if self.unused else ''}. If transformers can load the model, "
                "re-save it with save_pretrained and compress that folder."
            )
        for name, (path, key, shape, _) in self._place.items():
            if tuple(expected[name].shape) != shape:
                raise CheckpointError(
                    f"{path.name}: {key} has shape {shape}, the config asks for {tuple(expected[name].shape)}."
                )


class MemoryWeights:
    """The tensors of a model in memory; they are read, never changed."""

    def __init__(self, model: PreTrainedModel):
        self._tensors: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_meta:
                raise InputError(f"{name} is on the meta device: load the model with its weights first.")
            if id(tensor) not in seen:
                self._tensors[name] = tensor.detach()
            seen.add(id(tensor))
        self.unused: list[str] = []

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return tuple(self._tensors[name].shape), self._tensors[name].dtype

    def get(self, name: str) -> Tensor:
        return self._tensors[name].detach()


def companion_files(folder: Path) -> Iterator[Path]:
    """Tokenizer, chat template and generation config of a folder, relative to it, each once."""
    seen = set()
    for pattern in COMPANION_FILES:
        for path in sorted(folder.glob(pattern)):
            if path.is_file() and path not in seen:
                seen.add(path)
                yield path.relative_to(folder)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index.name} in {folder.name} is damaged: {_first_line(error)}") from error
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder.name} lacks {', '.join(missing)}, which {index.name} lists. Fetch it again."
            )
        return [folder / name for name in files]
    files = [folder / "model.safetensors"] if (folder / "model.safetensors").is_file() else []
    if files:
        return files
    other = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".h5")]
    if other:
        raise UnsupportedModelError(
            f"{folder.name} has no safetensors weights, only {', '.join(sorted(other)[:3])}; pickled files are never "
            "read. Re-save the model with transformers' save_pretrained and compress that folder."
        )
    raise InputError(f"{folder.name} has a config.json but no model.safetensors: its weights are missing.")


def _header(path: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Names, shapes and dtypes, after a check that the file is as long as its header says."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        size = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        # Also lets the library check what a plain read cannot see.
        with safe_open(path, framework="pt"):
            pass
    except (struct.error, ValueError, KeyError, OverflowError, MemoryError, SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path.name} in {path.parent.name} is truncated or damaged ({_first_line(error)}). Fetch or write it again."
        ) from error
    if size != path.stat().st_size:
        raise CheckpointError(f"{path.name} is damaged: {size} bytes expected, {path.stat().st_size} found.")
    for key, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise UnsupportedModelError(f"{path.name}: {key} is of dtype {entry['dtype']}, which is not supported.")
        yield key, tuple(entry["shape"]), _DTYPES[entry["dtype"]]


def _renaming(skeleton: PreTrainedModel) -> Callable[[str], str]:
    """Name in a file -> name in the model, by transformers' own rules."""
    transforms = get_model_conversion_mapping(skeleton)
    renamings = [rule for rule in transforms if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in transforms if isinstance(rule, WeightConverter)]
    if converters:
        raise UnsupportedModelError(
            f"transformers converts the weights of {type(skeleton).__name__} while it loads them (stacked or split "
            "tensors); such models are not supported yet."
        )
    expected = skeleton.state_dict()
    prefix = skeleton.base_model_prefix

    def rename(key: str) -> str:
        return rename_source_key(key, renamings, [], prefix, expected)[0]

    return rename


def _open_gguf(path: Path, folder: Path | None) -> Source:
    if path.suffix.lower() != ".gguf":
        raise InputError(f"{path} is a file, but no .gguf file. Expected a hub id, a model folder or a GGUF file.")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise InputError("Reading GGUF files needs the gguf package: pip install 'svdllm[gguf]'.") from error
    from svdllm.gguf import convert_gguf, gguf_config

    config = gguf_config(path)
    require_causal_lm(config, path.name)
    if folder is None:
        return Source(name=path.stem, revision=None, config=config, folder=None, weights=None)
    convert_gguf(path, config, folder)
    weights = SafetensorsWeights(folder, build_skeleton(config))
    return Source(name=path.stem, revision=None, config=config, folder=folder, weights=weights)


def _from_hub(name: str, revision: str | None, offline: bool, *, weights: bool) -> Path:
    """A local folder with the files of a hub repository."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith((".gguf", "/")):
        raise InputError(f"No such model: {name} does not exist here, and it is no hub id (owner/name).")
    patterns = ["config.json", "*.safetensors.index.json"]
    if weights:
        patterns += ["*.safetensors", "*.json", *COMPANION_FILES]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=offline))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise InputError(f"No such model: {name} is neither a folder or file here nor a model on the hub.") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        how = (
            "and --offline keeps from asking the hub"
            if offline
            else f"and the hub gave no answer ({_first_line(error)})"
        )
        raise InputError(
            f"No such model: {name} is neither a folder or file here nor in the local cache, {how}."
        ) from error


def _revision(folder: Path) -> str | None:
    """The commit, where the folder is a snapshot in the hub's cache."""
    return folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else None


def _display_name(text: str) -> str:
    """A hub id stays as it is, of a path only the last part is told."""
    is_path = Path(text).exists() or text.startswith((".", "/", "~"))
    return Path(text).resolve().name if is_path else text


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
