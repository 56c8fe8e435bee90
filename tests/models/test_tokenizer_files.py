"""Tokenizers that cannot be loaded: the file that is at fault is named, whatever the libraries throw."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from svdllm.common.errors import InputError
from svdllm.models.tokenizer_files import load_tokenizer
from tokenizers_local import byte_tokenizer

PANIC = {"type": "Precompiled", "precompiled_charsmap": "/////w=="}
OF_ANOTHER_VERSION = f"or made for another version of tokenizers than this one, {tokenizers.__version__}$"


def changed(name: str, **entries: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | entries))

    return change


def written(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text((folder / name).read_text()[:60])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed("tokenizer.json", model={"type": "BPE2"}), rf"/tokenizer\.json cannot be read .*{OF_ANOTHER_VERSION}"),
        (
            changed("tokenizer.json", pre_tokenizer={"type": "New"}),
            rf"/tokenizer\.json cannot be .*{OF_ANOTHER_VERSION}",
        ),
        (
            changed("tokenizer.json", decoder={"type": "New"}),
            rf"/tokenizer\.json cannot be read .*{OF_ANOTHER_VERSION}",
        ),
        (changed("tokenizer.json", normalizer=PANIC), rf"/tokenizer\.json cannot be read .*{OF_ANOTHER_VERSION}"),
        (cut("tokenizer.json"), r": tokenizer\.json is damaged: .*\. Copy it again from where the model comes from\.$"),
        (written("tokenizer.json", "[]"), r": tokenizer\.json is damaged: expected a JSON object, found list\."),
        (cut("tokenizer_config.json"), r": tokenizer_config\.json is damaged: "),
        (
            written("tokenizer_config.json", "[1]"),
            r": tokenizer_config\.json is damaged: expected a JSON object, found list\.",
        ),
        (
            changed("tokenizer_config.json", bos_token=5),
            r"^tiny has no tokenizer that transformers can load \(.*bos_token.*\): look at its tokenizer\.json, "
            r"tokenizer_config\.json, or pass token ids from Python$",
        ),
        (
            changed("tokenizer_config.json", added_tokens_decoder={"x": "y"}),
            r"can load \(.*added_tokens_decoder.*\): look at its tokenizer\.json, tokenizer_config\.json",
        ),
    ],
)
def test_a_file_that_is_damaged_or_newer_is_named(damage: Callable, message: str, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        load_tokenizer("tiny", tmp_path, None, offline=True)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^tiny has no tokenizer .*: put its tokenizer files beside the weights, or"):
        load_tokenizer("tiny", tmp_path, None, offline=True)


def test_code_of_a_folder_is_not_run(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    changed("tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})(tmp_path)
    try:
        load_tokenizer("tiny", tmp_path, None, offline=True)
    except InputError as error:
        assert "look at its tokenizer.json" in str(error)  # noqa: PT017
    assert not ran.exists()


def test_a_gguf_file_without_a_tokenizer(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "bare.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"^The tokenizer in bare\.gguf cannot be read \("):
        load_tokenizer("bare", None, file, offline=True)
