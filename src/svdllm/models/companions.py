"""Finds and copies the files beside a model's weights and config: tokenizer, processors, generation config."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_imports
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

from svdllm.common.errors import CheckpointError
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.low_rank.lowrank import read_object

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Of a wrapper: how images, videos and sound become tensors, and how these are joined with text.
PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
# Files that transformers reads for a tokenizer of any class.
EVERY_TOKENIZER = (
    TOKENIZER_CONFIG,
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
# Vocabularies of SentencePiece, tiktoken and mistral-common are recognised by the end of their names.
VOCABULARIES = ("*.model", "*.model.v*", "*.tiktoken", "*tekken*.json")
VERSIONED = re.compile(r"tokenizer\.[\w.]+\.json")
OUR_CODE = re.compile(r"(configuration|modeling)_svdllm_")  # a result has its own
# The files that decide which other files belong to a model.
DECIDING_FILES = ("config.json", TOKENIZER_CONFIG, "additional_chat_templates/*.jinja")


def copy_companion_files(folder: Path, target: Path, *, tokenizer: bool = True) -> None:
    """Copies the generation config, processors and, with ``tokenizer``, the tokenizer of a model, byte for byte."""
    for name in companion_files(folder) if tokenizer else map(Path, (GENERATION_CONFIG, *PROCESSORS)):
        if (folder / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, target / name)


def companion_files(folder: Path) -> list[Path]:
    """Lists the files of the generation config, processors and tokenizer of a model, relative to its folder."""
    found = {path for pattern in companion_patterns(folder) for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder) for path in found | _code_files(folder))


def companion_patterns(folder: Path) -> list[str]:
    """Lists names and patterns of the companion files of a model; its folder must have the ``DECIDING_FILES``.

    The code of a tokenizer is not among them, because its files are found by what they import: see ``companion_files``.
    """
    return [GENERATION_CONFIG, *PROCESSORS, *EVERY_TOKENIZER, *VOCABULARIES, *sorted(_vocabulary_names(folder))]


def has_own_code(folder: Path) -> bool:
    """Whether the tokenizer has a class of its own, whose code is in the folder or in another repository."""
    return any(True for _ in _class_references(folder))


def _vocabulary_names(folder: Path) -> set[str]:
    """Names the vocabulary files of a tokenizer's class, and the versions of ``tokenizer.json`` in its config."""
    settings, config = _read(folder / TOKENIZER_CONFIG), _read(folder / "config.json")
    family = TOKENIZER_MAPPING_NAMES.get(_family(config))
    classes = (settings.get("tokenizer_class"), config.get("tokenizer_class"), family)
    versions = settings.get("fast_tokenizer_files")
    named = {name for name in (versions if isinstance(versions, list) else []) if VERSIONED.fullmatch(str(name))}
    return named | {name for of in classes for name in _names_of(of)}


def _family(config: dict[str, Any]) -> str:
    """The model type; of a low-rank model, the dense model's. Loading the config reports a damaged entry, not this."""
    with suppress(CheckpointError):
        if info := LowRankInfo.of(config):
            return info.base_model_type
    return str(config.get("model_type"))


def _names_of(tokenizer_class: Any) -> Iterator[str]:
    """Yields the ``vocab_files_names`` of a class of transformers; nothing if a package that it needs is missing."""
    if isinstance(tokenizer_class, str):
        try:
            found = tokenizer_class_from_name(tokenizer_class)
            yield from getattr(found, "vocab_files_names", {}).values()
        except ImportError:
            return


def _code_files(folder: Path) -> set[Path]:
    """Finds the code files of a tokenizer and the files of the folder that they import. They are copied, never run."""
    found: set[Path] = set()
    waiting = [folder / f"{reference.split('.')[0]}.py" for reference in _class_references(folder)]
    while waiting:
        path = waiting.pop()
        if path not in found and path.parent == folder and path.is_file() and not OUR_CODE.match(path.name):
            found.add(path)
            waiting += [folder / f"{module}.py" for module in _imports(path)]
    return found


def _imports(code: Path) -> list[str]:
    try:
        return get_relative_imports(code)
    except UnicodeDecodeError:
        return []


def _class_references(folder: Path) -> Iterator[str]:
    """Yields references such as ``tokenization_x.XTokenizer``, or ``owner/name--tokenization_x.XTokenizer``."""
    references = _read(folder / TOKENIZER_CONFIG).get("auto_map")
    if isinstance(references, dict):
        references = references.get("AutoTokenizer")
    for reference in references if isinstance(references, list) else [references]:
        if isinstance(reference, str):
            yield reference


def _read(file: Path) -> dict[str, Any]:
    """Reads a JSON file; a missing or damaged one is empty here, and reported when the model or tokenizer is loaded."""
    try:
        return read_object(file)
    except (OSError, ValueError):
        return {}
