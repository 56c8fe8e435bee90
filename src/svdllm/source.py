"""Where a model comes from: a hub id, a local folder, a GGUF file or a model in memory."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from svdllm.data.specs import require_extra
from svdllm.errors import InputError, UnsupportedModelError, first_line
from svdllm.tokenizer_files import load_tokenizer
from svdllm.weights import MemoryWeights, SafetensorsWeights, Weights, weight_files

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
    "generation_config.json",
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to read from. ``folder`` holds its companion files; ``weights`` is None where only the config is known."""

    name: str
    revision: str | None
    config: PreTrainedConfig
    folder: Path | None
    weights: Weights | None
    model: PreTrainedModel | None = None
    gguf: Path | None = None

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

    @property
    def weight_bytes(self) -> int:
        """Size of the weight files; 0 where only the config is known."""
        if self.gguf is not None:
            return self.gguf.stat().st_size
        has_files = self.folder is not None and any(self.folder.glob("*.safetensors"))
        return sum(path.stat().st_size for path in weight_files(self.folder)) if has_files else 0  # type: ignore[arg-type]

    def load_tokenizer(self, offline: bool = False) -> Any:
        """The tokenizer beside the weights; see ``svdllm.tokenizer_files``."""
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
        gguf_folder: where a GGUF file is dequantised to; without it only the config of such a file is opened.

    Raises:
        InputError: no such model, or files missing from it.
        UnsupportedModelError: not a causal language model, or weights in a form that cannot be read.
    """
    if isinstance(model, PreTrainedModel):
        require_causal_lm(model.config, type(model).__name__)
        _check_quantization(model.config, type(model).__name__, allowed=False)
        name = getattr(model, "name_or_path", "") or type(model).__name__
        return Source(
            name=_display_name(name),
            revision=None,
            config=model.config,
            folder=None,
            weights=MemoryWeights(model, build_skeleton(model.config)),
            model=model,
        )
    text = _as_text(model)
    if Path(text).is_file():
        return _open_gguf(Path(text), gguf_folder)
    folder = Path(text) if Path(text).is_dir() else _from_hub(text, revision, offline, weights=True)
    config = load_config(folder, name=text)
    weights = SafetensorsWeights(folder, build_skeleton(config))
    return Source(name=_display_name(text), revision=_revision(folder), config=config, folder=folder, weights=weights)


def open_config(
    model: str | Path | PreTrainedModel,
    *,
    offline: bool = False,
    revision: str | None = None,
    allow_quantized: bool = False,
) -> Source:
    """Like ``open_source``, but reads no weights: of a hub id, only its config is fetched.

    With ``allow_quantized``, also of a model that ``svdllm quantize`` wrote: it can be run, and nothing else.
    """
    text = "" if isinstance(model, PreTrainedModel) else _as_text(model)
    if Path(text).is_file():
        return _open_gguf(Path(text), None)
    is_folder = Path(text).is_dir()
    if isinstance(model, PreTrainedModel) or (is_folder and not (allow_quantized and is_quantized(Path(text)))):
        return open_source(model, offline=offline)
    folder = Path(text) if is_folder else _from_hub(text, revision, offline, weights=False)
    config = load_config(folder, name=text, allow_quantized=allow_quantized)
    name = _display_name(text) if is_folder else text
    return Source(name=name, revision=_revision(folder), config=config, folder=folder, weights=None)


def load_config(folder: Path, name: str, *, allow_quantized: bool = False) -> PreTrainedConfig:
    """The config of a folder, which must be a causal language model's, and not quantised unless that is allowed."""
    if not (folder / "config.json").is_file():
        found = sorted(path.name for path in folder.iterdir())[:6]
        raise InputError(
            f"{name} is no model folder: it has no config.json (found {', '.join(found) or 'nothing'}). Expected a "
            "folder as written by save_pretrained."
        )
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise UnsupportedModelError(
            f"The config of {name} cannot be read by transformers: {first_line(error)}"
        ) from error
    require_causal_lm(config, name)
    _check_quantization(config, name, allow_quantized)
    return config


def is_quantized(folder: Path) -> bool:
    """Whether the config of a folder says that its weights are stored in few bits."""
    try:
        return bool(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config"))
    except (OSError, ValueError, AttributeError):
        return False  # which ``load_config`` tells


def context_length(config: PreTrainedConfig) -> int | None:
    """The most tokens a model can take at once, where its config says so; XLNet says -1 for no limit."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest if longest is not None and longest > 0 else None


def require_causal_lm(config: PreTrainedConfig, name: str) -> None:
    """Raises UnsupportedModelError unless the config is a decoder-only language model's."""
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


def _check_quantization(config: PreTrainedConfig, name: str, allowed: bool) -> None:
    """Raises UnsupportedModelError if the weights are in few bits and something else than to run them is meant."""
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return
    method = (settings if isinstance(settings, dict) else settings.to_dict()).get("quant_method", "unknown")
    if not allowed:
        raise UnsupportedModelError(
            f"{name} is quantised ({method}). Quantisation comes last: such a model can be run and measured, but not "
            "compressed, sliced, trained, exported or quantised again. Use the model that it was made of."
        )
    if method == "torchao":
        require_extra("torchao", f"{name}, which is quantised,", extra="quantize")


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model on the meta device, buffers real (rotary tables are computed in the constructor)."""
    with init_empty_weights(include_buffers=False):
        config = copy.deepcopy(config)  # building a model writes the dtype into its config
        if "flash" in (getattr(config, "_attn_implementation", None) or ""):
            config._attn_implementation = "sdpa"  # which computes the same in any dtype and on any device
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return skeleton.eval().requires_grad_(False)


def companion_files(folder: Path) -> Iterator[Path]:
    """Tokenizer, chat template and generation config of a folder, relative to it, each once."""
    seen = set()
    for pattern in COMPANION_FILES:
        for path in sorted(folder.glob(pattern)):
            if path.is_file() and path not in seen:
                seen.add(path)
                yield path.relative_to(folder)


def copy_companion_files(folder: Path, target: Path) -> None:
    """Tokenizer, chat template and generation config of a folder, as they are."""
    for path in companion_files(folder):
        shutil.copyfile(folder / path, target / path)


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
        return Source(name=path.stem, revision=None, config=config, folder=None, weights=None, gguf=path)
    convert_gguf(path, config, folder)
    weights = SafetensorsWeights(folder, build_skeleton(config))
    return Source(name=path.stem, revision=None, config=config, folder=folder, weights=weights, gguf=path)


def _from_hub(name: str, revision: str | None, offline: bool, *, weights: bool) -> Path:
    """A local folder with the files of a hub repository."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith((".gguf", "/")):
        raise InputError(f"No such model: {name} does not exist here, and it is no hub id (owner/name).")
    patterns = ["config.json", "*.safetensors.index.json", *COMPANION_FILES, *(["*.safetensors"] if weights else [])]
    skipped = ["*/*", "consolidated*"]  # other variants of the same weights
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns=skipped, local_files_only=offline
            )
        )
    except GatedRepoError as error:
        raise InputError(
            f"{name} is gated: accept its terms on its page on the hub, then log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{name} has no revision {revision!r}; --revision takes a branch, tag or commit.") from error
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise InputError(f"No such model: {name} is neither a folder or file here nor a model on the hub.") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        how = (
            "and --offline keeps from asking the hub"
            if offline
            else f"and the hub gave no answer ({first_line(error)})"
        )
        raise InputError(
            f"No such model: {name} is neither a folder or file here nor in the local cache, {how}."
        ) from error


def _as_text(model: Any) -> str:
    if not isinstance(model, str | Path):
        raise InputError(
            f"A model is a hub id, a path or a transformers PreTrainedModel, found {type(model).__name__}. Of a model "
            "with an adapter, merge the adapter first (merge_and_unload)."
        )
    return str(model)


def _revision(folder: Path) -> str | None:
    """The commit, where the folder is a snapshot in the hub's cache."""
    return folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else None


def _display_name(text: str) -> str:
    """A hub id stays as it is, of a path only the last part is told."""
    is_path = Path(text).exists() or text.startswith((".", "/", "~"))
    return Path(text).resolve().name if is_path else text
