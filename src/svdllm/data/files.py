"""Reads local files of text or rows: plain text, JSON, JSON lines and parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from svdllm.common.errors import InputError, explaining
from svdllm.common.extras import require_extra

CHAT_FIELD = "messages"
DEFAULT_FIELDS = ("text", CHAT_FIELD)
# Columns that show that a line of a plain text file is a row.
ROW_FIELDS = {*DEFAULT_FIELDS, "conversations", "instruction", "prompt", "content"}
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_text(path: Path) -> str:
    """Reads a file of text. Raises InputError if it is empty, or not UTF-8."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as err:
        encoding = "-f UTF-16 " if data.startswith(UTF_16_MARKS) else ""
        raise InputError(
            f"{path} is not UTF-8: byte {data[err.start]:#04x} at position {err.start}; "
            f"convert it, for example with iconv {encoding}-t UTF-8"
        ) from err
    if (position := data.find(b"\0")) >= 0:
        raise InputError(
            f"{path} is not text: byte 0x00 at position {position}. Give a text file in UTF-8; convert one in "
            "UTF-16 with iconv -f UTF-16 -t UTF-8"
        )
    if not text.strip():
        raise InputError(f"{path} is empty: give a file with text")
    return text


def refuse_rows(text: str, path: Path) -> None:
    """Raises InputError for rows in a file named as plain text, which would train on brackets and keys."""
    start = text.lstrip()
    first = start if start.startswith("[") else start.partition("\n")[0]
    if not first.startswith(("{", "[")):
        return
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return
    row = row[0] if isinstance(row, list) and row else row
    if isinstance(row, dict) and "role" not in row and ROW_FIELDS & row.keys():  # with it, the file is one chat
        suffix = ".json" if first.startswith("[") else ".jsonl"
        raise InputError(
            f"{path} is plain text by its name and holds rows in JSON, with {', '.join(row)}: rename it to "
            f"{path.with_suffix(suffix).name}"
        )


def json_rows(path: Path, *, whole_file_may_be_a_list: bool) -> list[dict[str, Any]]:
    text = read_text(path)
    if whole_file_may_be_a_list and text.lstrip().startswith("["):
        return _json_list(path, text)
    rows = []
    # only "\n" ends a line of JSON: str.splitlines would also cut at U+2028 inside a string
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        with explaining(f"{path}, line {number}: not valid JSON", "expected one object per line"):
            row = json.loads(line)
        rows.append(_as_object(row, f"{path}, line {number}"))
    return rows


def _json_list(path: Path, text: str) -> list[dict[str, Any]]:
    with explaining(f"{path}: not valid JSON", "expected a list of objects"):
        rows = json.loads(text)
    if not rows:
        raise InputError(f"{path} is an empty list: give a file with rows")
    return [_as_object(row, f"{path}, row {number}") for number, row in enumerate(rows)]


def _as_object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f'{where}: expected an object such as {{"text": "..."}}, found {type(row).__name__}')
    return row


@contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    require_extra("pyarrow", f"reading {path}")
    from pyarrow import parquet

    advice = "it may be cut short, or written by a newer version of pyarrow"
    with explaining(f"{path} is not a readable parquet file", advice), parquet.ParquetFile(path) as file:
        yield file
