"""Where a model comes from: a hub id, a local folder, a GGUF file or a model in memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from svdllm.common.errors import CheckpointError, InputError, UnsupportedModelError, first_line
from svdllm.common.extras import require_extra
from svdllm.models.companions import DECIDING_FILES, companion_patterns, has_own_code
from svdllm.models.low_rank.lowrank import WEIGHT_FILE, WEIGHT_INDEX_FILE, read_object, weight_file_names
from svdllm.models.model_names import display_name
from svdllm.models.skeleton import build_skeleton
from svdllm.models.tokenizer_files import load_tokenizer
from svdllm.models.unused_tensors import UnusedTensors, warn_of_unused
from svdllm.models.weights import MemoryWeights, SafetensorsWeights, Weights

ADAPTER_FILE = "adapter_config.json"  # of PEFT
# How names of classes end, in lower case: early conversions have LLaMAForCausalLM.
_HEADS = ("forcausallm", "lmheadmodel")


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
    unused: UnusedTensors | None = None  # in its files, as far as they are known

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
        files = [] if self.folder is None else [self.folder / name for name in weight_file_names(self.folder)]
        return sum(path.stat().st_size for path in files if path.is_file())

    def load_tokenizer(self, offline: bool = False) -> Any:
        """The tokenizer beside the weights; see ``svdllm.models.tokenizer_files``."""
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
        revision=_revision(folder),
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
    folder = Path(text) if is_folder else hub_folder(text, revision, offline, weights=False)
    config = load_config(folder, name=text, allow_quantized=allow_quantized)
    return Source(name=display_name(text), revision=_revision(folder), config=config, folder=folder, weights=None)


def load_config(folder: Path, name: str, *, allow_quantized: bool = False) -> PreTrainedConfig:
    """The config of a folder, which must be a causal language model's, and not quantised unless that is allowed.

    Code that comes with a model is never run, nor is anybody asked whether it should be.
    """
    _refuse_adapter(folder, name)
    fields = _read_config(folder, name)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of any kind, by the class of the config and what is wrong in it
        own_code = fields.get("model_type") not in CONFIG_MAPPING and "auto_map" in fields
        raise UnsupportedModelError(
            f"{name} needs code of its own for its model_type {fields.get('model_type')!r}, which transformers does not "
            "have; svdllm never runs such code."
            if own_code
            else f"The config of {name} cannot be read by transformers: {first_line(error)}"
        ) from error
    _require_settings(config, name)
    require_causal_lm(config, name)
    _check_quantization(config, name, allow_quantized)
    return config


def _require_settings(config: PreTrainedConfig, name: str) -> None:
    """Raises CheckpointError if the config is a low-rank model's, and does not say of what or how."""
    settings = getattr(config, "svdllm", None)
    wanted = {"base_model_type": str, "ranks": dict}
    if settings is None or (
        isinstance(settings, dict) and all(isinstance(settings.get(k), t) for k, t in wanted.items())
    ):
        return
    raise CheckpointError(
        f"config.json of {name} is damaged: expected 'svdllm' to be an object with a 'base_model_type' and 'ranks'. Fetch or "
        "write it again."
    )


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    """The content of ``config.json``."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{name} is no model folder: it has no config.json{_what_it_has(folder)}")
    try:
        return read_object(folder / "config.json")
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{name} cannot be read: {first_line(error)} Fetch or write it again.") from error


def _what_it_has(folder: Path) -> str:
    """The end of a sentence on a folder that is no model's: what else is in it, and what to do."""
    if ggufs := sorted(map(str, folder.glob("*.gguf"))):
        return f", but GGUF weights. Pass {'the file' if len(ggufs) == 1 else 'one of the files'}: {', '.join(ggufs)}."
    found = sorted(path.name for path in folder.iterdir())[:6]
    of_gguf = " Of a repository of GGUF files, download one and pass its path." if _revision(folder) else ""
    return f" (found {', '.join(found) or 'nothing'}). Expected a folder as written by save_pretrained.{of_gguf}"


def _refuse_adapter(folder: Path, name: str) -> None:
    """Raises InputError for an adapter of PEFT, also beside a model: transformers would load both, if PEFT is there."""
    if not (folder / ADAPTER_FILE).is_file():
        return
    if (folder / "config.json").is_file():
        raise InputError(
            f"{name} has an adapter ({ADAPTER_FILE}) beside a model. Merge it into the model first, or remove "
            f"{ADAPTER_FILE} if it is merged already."
        )
    raise InputError(
        f"{name} is an adapter of PEFT, not a model. Merge the adapter first, and use the folder that this writes: "
        f"peft.AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload().save_pretrained('merged'), and its "
        "tokenizer beside it."
    )


def is_quantized(folder: Path) -> bool:
    """Whether the config of a folder says that its weights are stored in few bits."""
    try:
        return bool(read_object(folder / "config.json").get("quantization_config"))
    except (OSError, ValueError):
        return False  # which ``load_config`` tells


def context_length(config: PreTrainedConfig) -> int | None:
    """The most tokens a model can take at once, where its config says so; XLNet says -1 for no limit."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest if longest is not None and longest > 0 else None


def require_causal_lm(config: PreTrainedConfig, name: str) -> None:
    """Raises UnsupportedModelError unless the config is a decoder-only language model's.

    transformers goes by ``model_type``, whatever ``architectures`` spells, but a head for something else has no weights
    for the vocabulary.
    """
    family = getattr(config, "svdllm", None) and config.svdllm["base_model_type"]
    model_type = family or config.model_type
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, "")
    architectures = [config.architectures] if isinstance(config.architectures, str) else config.architectures or []
    has_head = any(name == expected or name.lower().endswith(_HEADS) for name in architectures or [expected])
    is_decoder = bool(expected) and not config.is_encoder_decoder
    if is_decoder and has_head:
        return
    refuse_several_parts(config, name)
    if not is_decoder:
        named = f" ({architectures[0]})" if architectures else ""
        raise UnsupportedModelError(
            f"{name} is not a causal language model: its model_type is {model_type!r}{named}, for which transformers has no "
            "decoder-only language model. Expected something like llama, qwen2 or gpt2."
        )
    raise UnsupportedModelError(
        f"{name} is not a causal language model: its architecture is {architectures[0]}, expected {expected}."
    )


def refuse_several_parts(config: PreTrainedConfig, name: str) -> None:
    """Raises UnsupportedModelError for a language model within a larger model, which can be compressed by itself."""
    text = config.get_text_config(decoder=True)
    is_alone = text.model_type == config.model_type or config.is_encoder_decoder or text.is_encoder_decoder
    if not is_alone and MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text.model_type, "").endswith("ForCausalLM"):
        raise UnsupportedModelError(
            f"{name} is more than a language model: its model_type is {config.model_type!r}. The language model in it, of "
            f"type {text.model_type!r}, can be compressed once it is saved alone: see 'multimodal' in docs/faq.md."
        )


def _check_quantization(config: PreTrainedConfig, name: str, allowed: bool) -> None:
    """Raises UnsupportedModelError if the weights are in few bits and something else than to run them is meant."""
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    method = getattr(method, "value", method) or "unknown"
    if not allowed:
        raise UnsupportedModelError(
            f"{name} is quantised ({method}). Quantisation comes last: such a model can be run and measured, but not "
            "compressed, sliced, trained, exported or quantised again. Use the model that it was made of."
        )
    if method == "torchao":
        require_extra("torchao", f"{name}, which is quantised,", extra="quantize")


def _open_gguf(path: Path, folder: Path | None) -> Source:
    if path.suffix.lower() != ".gguf":
        raise InputError(f"{path} is a file, but no .gguf file. Expected a hub id, a model folder or a GGUF file.")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise InputError("Reading GGUF files needs the gguf package: pip install 'svdllm[gguf]'.") from error
    from svdllm.models.gguf import GgufFile, convert_gguf

    file = GgufFile(path)
    config = file.config()
    require_causal_lm(config, path.name)
    unused = file.unused(build_skeleton(config))
    warn_of_unused(path.name, unused)
    weights = None
    if folder is not None:
        convert_gguf(path, config, folder)
        weights = SafetensorsWeights(folder, build_skeleton(config))
    return Source(
        name=path.stem, revision=None, config=config, folder=folder, weights=weights, gguf=path, unused=unused
    )


def hub_folder(name: str, revision: str | None, offline: bool, *, weights: bool) -> Path:
    """A local folder with the files of a hub repository: config and tokenizer, and with ``weights`` those as well.

    Raises:
        InputError: there is no such repository, or it cannot be reached.
    """
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
    fetch = partial(snapshot_download, name, local_files_only=offline)
    try:
        folder = Path(fetch(revision=revision, allow_patterns=[*DECIDING_FILES, ADAPTER_FILE]))
        fetch = partial(fetch, revision=_revision(folder) or revision)
        code = ["*.py"] if has_own_code(folder) else []  # is copied, never run
        fetch(allow_patterns=companion_patterns(folder) + code, ignore_patterns=["*/*"])
        if weights:
            _fetch_weights(fetch, folder)
        return folder
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


def _fetch_weights(fetch: Callable[..., Any], folder: Path) -> None:
    """Fetches the weight files that transformers would (``weight_file_names``), and no other variants of them."""
    with suppress(ValueError):  # what is missing or damaged is told when the folder is opened
        named = _read_config(folder, folder.name).get("transformers_weights")
        fetch(allow_patterns=[escape(named) if isinstance(named, str) else WEIGHT_FILE])
        if not weight_file_names(folder):
            fetch(allow_patterns=[WEIGHT_INDEX_FILE])
        if missing := [escape(name) for name in weight_file_names(folder) if not (folder / name).is_file()]:
            fetch(allow_patterns=missing)


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
