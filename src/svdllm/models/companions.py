"""Files that belong to a model beside its weights and its config: those of its tokenizer, and its generation config."""

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
# Vocabularies that are recognised by the end of their name: of SentencePiece, of tiktoken and of mistral-common.
VOCABULARIES = ("*.model", "*.model.v*", "*.tiktoken", "*tekken*.json")
VERSIONED = re.compile(r"tokenizer\.[\w.]+\.json")
OUR_CODE = re.compile(r"(configuration|modeling)_svdllm_")  # which a result has of its own
# The files that tell which others there are.
DECIDING_FILES = ("config.json", TOKENIZER_CONFIG, "additional_chat_templates/*.jinja")


def copy_companion_files(folder: Path, target: Path, *, tokenizer: bool = True) -> None:
    """Copies generation config and tokenizer of a model, byte for byte; without ``tokenizer`` only the first."""
    for name in companion_files(folder) if tokenizer else [Path(GENERATION_CONFIG)]:
        if (folder / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, target / name)


def companion_files(folder: Path) -> list[Path]:
    """Generation config and tokenizer of a model, relative to its folder."""
    found = {path for pattern in companion_patterns(folder) for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder) for path in found | _code_files(folder))


def companion_patterns(folder: Path) -> list[str]:
    """Names and patterns of the companion files of a model of which the folder has at least ``DECIDING_FILES``.

    Code of a tokenizer is not among them: it is told by the files that it imports, see ``companion_files``.
    """
    return [GENERATION_CONFIG, *EVERY_TOKENIZER, *VOCABULARIES, *sorted(_vocabulary_names(folder))]


def has_own_code(folder: Path) -> bool:
    """Whether the tokenizer names a class of its own, which runs code of the folder or of another repository."""
    return any(True for _ in _class_references(folder))


def _vocabulary_names(folder: Path) -> set[str]:
    """The files that a tokenizer's class looks for, and the versions of ``tokenizer.json`` that its config names."""
    settings, config = _read(folder / TOKENIZER_CONFIG), _read(folder / "config.json")
    family = TOKENIZER_MAPPING_NAMES.get(_family(config))
    classes = (settings.get("tokenizer_class"), config.get("tokenizer_class"), family)
    versions = settings.get("fast_tokenizer_files")
    named = {name for name in (versions if isinstance(versions, list) else []) if VERSIONED.fullmatch(str(name))}
    return named | {name for of in classes for name in _names_of(of)}


def _family(config: dict[str, Any]) -> str:
    """The model type, of a low-rank model that of the dense one; a damaged entry is reported when the config is loaded."""
    with suppress(CheckpointError):
        if info := LowRankInfo.of(config):
            return info.base_model_type
    return str(config.get("model_type"))


def _names_of(tokenizer_class: Any) -> Iterator[str]:
    """The names in ``vocab_files_names`` of a class of transformers; none if a package that it needs is missing."""
    if isinstance(tokenizer_class, str):
        try:
            found = tokenizer_class_from_name(tokenizer_class)
            yield from getattr(found, "vocab_files_names", {}).values()
        except ImportError:
            return


def _code_files(folder: Path) -> set[Path]:
    """The files of a tokenizer's own code, and what they import of the folder. They are copied, and never run here."""
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
    """References such as ``tokenization_x.XTokenizer``, or ``owner/name--tokenization_x.XTokenizer`` elsewhere."""
    references = _read(folder / TOKENIZER_CONFIG).get("auto_map")
    if isinstance(references, dict):
        references = references.get("AutoTokenizer")
    for reference in references if isinstance(references, list) else [references]:
        if isinstance(reference, str):
            yield reference


def _read(file: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if it has none, which loading the model or the tokenizer reports."""
    try:
        return read_object(file)
    except (OSError, ValueError):
        return {}
