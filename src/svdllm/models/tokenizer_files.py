"""The tokenizer of a model folder or GGUF file; where it cannot be loaded, the file that is at fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer

from svdllm.common.errors import InputError, explaining

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
    """What transformers makes of the files; code of a folder is never run.

    Raises:
        InputError: there is no tokenizer, or a file of it cannot be read; names the file.
    """
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(folder)}
    if folder is None and gguf is not None:
        place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    found = [folder / file for file in JSON_FILES if (folder / file).is_file()] if folder is not None else []
    look = (
        f"look at its {', '.join(file.name for file in found)}"
        if found
        else "put its tokenizer files beside the weights"
    )
    problem, advice = f"{name} has no tokenizer that transformers can load", f"{look}, or pass token ids from Python"
    try:
        with explaining(problem, advice):
            return AutoTokenizer.from_pretrained(**place, local_files_only=offline, trust_remote_code=False)
    except InputError:
        for file in found:
            _require_readable(file)
        raise


def _require_readable(file: Path) -> None:
    """Raises InputError if the file is no JSON, or one of another version of tokenizers."""
    with explaining(f"{file} is damaged", "copy it again from where the model comes from"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, found {type(content).__name__}")
    if file.name == TOKENIZER_FILE:
        advice = f"it is damaged, or made for another version of tokenizers than this one, {tokenizers.__version__}"
        with explaining(f"{file} cannot be read by tokenizers", advice):
            tokenizers.Tokenizer.from_file(str(file))
