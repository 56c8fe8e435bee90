"""Loads the tokenizer of a model folder or GGUF file; where that fails, finds the file at fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer

from svdllm.common.errors import InputError, explaining
from svdllm.models.low_rank.lowrank import read_object

TOKENIZER_FILE = "tokenizer.json"
JSON_FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "vocab.json",
)


def load_tokenizer(name: str, folder: Path | None, gguf: Path | None, *, offline: bool) -> Any:
    """Loads the tokenizer of a folder, or else of a GGUF file; code of a folder is never run.

    Raises:
        InputError: there is no tokenizer, or a file of it cannot be read; names the file.
    """
    if folder is None and gguf is not None:
        with explaining(
            f"The tokenizer in {gguf.name} cannot be read", "convert the model again, with its own tokenizer"
        ):
            return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    found = [folder / file for file in JSON_FILES if (folder / file).is_file()] if folder is not None else []
    look = (
        "look at its " + ", ".join(file.name for file in found)
        if found
        else "put its tokenizer files beside the weights"
    )
    problem, advice = f"{name} has no tokenizer that transformers can load", f"{look}, or pass token ids from Python"
    try:
        with explaining(problem, advice):
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=offline, trust_remote_code=False)
    except InputError:
        for file in found:
            _require_readable(file)
        raise


def _require_readable(file: Path) -> None:
    """Raises InputError if the file does not hold a JSON object, or one of another version of tokenizers."""
    try:
        read_object(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file.parent}: {error} Copy it again from where the model comes from.") from error
    if file.name == TOKENIZER_FILE:
        advice = f"it is damaged, or made for another version of tokenizers than this one, {tokenizers.__version__}"
        with explaining(f"{file} cannot be read by tokenizers", advice):
            tokenizers.Tokenizer.from_file(str(file))
