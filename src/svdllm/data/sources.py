"""Documents of any source: files, hub datasets, the built-in text, and what the caller holds in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from svdllm.common.errors import InputError, explaining, first_line
from svdllm.common.extras import require_extra
from svdllm.data.corpus import python_docs
from svdllm.data.specs import (
    ROW_JOINER,
    TEXT_SUFFIXES,
    DocsSpec,
    FileSpec,
    HubSpec,
    MixtureSpec,
    NamedSet,
    Spec,
    check_texts,
)

CHAT_FIELD = "messages"
DEFAULT_FIELDS = ("text", CHAT_FIELD)
# Columns by which a line of a plain text file is known for a row.
ROW_FIELDS = {*DEFAULT_FIELDS, "conversations", "instruction", "prompt", "content"}
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Rows that become one text: each is a str, or a chat (a list of role/content dicts).

    promises_chats: whether the column is one of chats by its name.
    """

    rows: Sequence[Any]
    source: str
    joiner: str = ROW_JOINER
    per_document: bool = False
    promises_chats: bool = False

    def row(self, index: int) -> Any:
        """One row, which a data set may read only now."""
        with explaining(f"{self.source}, row {index} cannot be read"):
            return self.rows[index]

    def all_rows(self) -> list[Any]:
        with explaining(f"the rows of {self.source} cannot be read"):
            return list(self.rows)


def documents_of(source: Any) -> Documents:
    """The documents of an object in memory; strings go through ``documents_of_spec``."""
    if isinstance(source, (list, tuple)):
        check_texts(source)
        return Documents(rows=source, source=f"list of {len(source)} texts")
    return _from_dataset(source, f"datasets.Dataset of {_num_rows(source)} rows", field=None)


def documents_of_spec(spec: Spec, *, evaluation: bool, offline: bool) -> Documents:
    """Read what ``spec`` names.

    Raises:
        InputError: the file or the dataset cannot be read, or it holds no such column.
    """
    if isinstance(spec, NamedSet):
        part = spec.evaluation if evaluation else spec.calibration
        if isinstance(part, DocsSpec):
            label = "evaluation" if evaluation else "calibration"
            return Documents(rows=python_docs(evaluation=evaluation), source=f"{spec.name} ({label} topics)")
        return _from_hub(part, evaluation=evaluation, offline=offline)
    if isinstance(spec, HubSpec):
        return _from_hub(spec, evaluation=evaluation, offline=offline)
    if isinstance(spec, FileSpec):
        return _from_file(spec)
    raise TypeError(f"a {MixtureSpec.__name__} has no documents of its own")


def rows_of_spec(spec: Spec, *, evaluation: bool, offline: bool) -> list[dict[str, Any]]:
    """All columns of a file or data set with rows; none for plain text.

    Raises:
        InputError: the file or the dataset cannot be read.
    """
    if isinstance(spec, HubSpec):
        require_extra("datasets", f"the data set '{spec.repo}'")
        dataset = _load_dataset(spec, spec.split or ("test" if evaluation else "train"), offline=offline)
        with explaining(f"the rows of the data set {spec.repo} cannot be read"):
            return list(dataset)
    if not isinstance(spec, FileSpec) or spec.path.suffix.lower() in TEXT_SUFFIXES:
        return []
    if spec.path.suffix.lower() == ".parquet":
        with _parquet_file(spec.path) as file:
            return file.read().to_pylist()
    return _json_rows(spec.path, whole_file_may_be_a_list=spec.path.suffix.lower() == ".json")


# ---- files


def _from_file(spec: FileSpec) -> Documents:
    path, suffix = spec.path, spec.path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        text = _read_text(path)
        _refuse_rows(text, path)
        return Documents(rows=[text], source=str(path))
    if suffix == ".parquet":
        return _from_parquet(path, spec.field)
    rows = _json_rows(path, whole_file_may_be_a_list=suffix == ".json")
    columns = sorted({name for row in rows for name in row})
    field = _choose_field(columns, spec.field, str(path))
    for number, row in enumerate(rows):
        if field not in row:
            raise InputError(f"{path}: row {number} has no column '{field}', it has: {', '.join(sorted(row))}")
    return _documents([row[field] for row in rows], str(path), field)


def _documents(rows: Sequence[Any], source: str, field: str) -> Documents:
    return Documents(rows=rows, source=f"{source}:{field}", promises_chats=field == CHAT_FIELD)


def _read_text(path: Path) -> str:
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
            f"{path} is no text: byte 0x00 at position {position}. Give a text file in UTF-8; one in UTF-16 is converted "
            "with iconv -f UTF-16 -t UTF-8"
        )
    if not text.strip():
        raise InputError(f"{path} is empty: give a file with text")
    return text


def _refuse_rows(text: str, path: Path) -> None:
    """Raises InputError for a file of rows that is called plain text: its brackets and keys are not what is meant."""
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


def _json_rows(path: Path, *, whole_file_may_be_a_list: bool) -> list[dict[str, Any]]:
    text = _read_text(path)
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


def _from_parquet(path: Path, field: str | None) -> Documents:
    with _parquet_file(path) as file:
        field = _choose_field(file.schema_arrow.names, field, str(path))
        rows = file.read(columns=[field]).column(field).to_pylist()
    return _documents(rows, str(path), field)


@contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    require_extra("pyarrow", f"reading {path}")
    from pyarrow import parquet

    advice = "it may be cut short, or written by a newer version of pyarrow"
    with explaining(f"{path} is not a readable parquet file", advice), parquet.ParquetFile(path) as file:
        yield file


def _choose_field(columns: Sequence[str], asked: str | None, where: str) -> str:
    wanted = DEFAULT_FIELDS if asked is None else (asked,)
    for field in wanted:
        if field in columns:
            return field
    names = " or ".join(f"'{field}'" for field in wanted)
    raise InputError(f"{where} has no column {names}, it has: {', '.join(columns)}; name one after a ':'")


# ---- datasets


def _from_hub(spec: HubSpec, *, evaluation: bool, offline: bool) -> Documents:
    require_extra("datasets", f"the data set '{spec.repo}'")
    split = spec.split or ("test" if evaluation else "train")
    dataset = _load_dataset(spec, split, offline=offline)
    if spec.max_documents is not None:
        dataset = dataset.select(range(min(spec.max_documents, len(dataset))))
    label = ":".join(part for part in (spec.repo, spec.config or spec.data_file, split) if part)
    documents = _from_dataset(dataset, label, spec.field)
    return replace(documents, joiner=spec.joiner, per_document=spec.per_document)


def _load_dataset(spec: HubSpec, split: str, *, offline: bool) -> Any:
    import datasets
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import LocalEntryNotFoundError

    name = f"{spec.repo}, config {spec.config or 'default'}, split {split}"
    with hub_offline(offline), explaining(f"the data set {name} cannot be loaded"):
        try:
            if spec.data_file is None:
                return datasets.load_dataset(spec.repo, spec.config, split=split)
            kind = "parquet" if spec.data_file.endswith(".parquet") else "json"
            return datasets.load_dataset(kind, data_files={split: _hub_file(spec, spec.data_file)}, split=split)
        except DatasetNotFoundError as err:
            raise InputError(
                f"the data set {spec.repo} does not exist on the hub or may not be read ({first_line(err)}): "
                "check the name, or log in with hf auth login"
            ) from err
        except (ConnectionError, LocalEntryNotFoundError) as err:
            raise InputError(_not_reached(spec, offline, err)) from err
        except ValueError as err:
            if "Couldn't find cache" in str(err):
                raise InputError(_not_reached(spec, offline, err)) from err
            raise


def _hub_file(spec: HubSpec, name: str) -> str:
    """The path of one file of a repository, from the hub's cache where it can be.

    ``load_dataset(repo, data_files=...)`` would do, but what it caches it does not find again offline.
    """
    from huggingface_hub import hf_hub_download

    local = Path(spec.repo, name)
    if local.is_file():
        return str(local)
    return hf_hub_download(spec.repo, name, repo_type="dataset", revision=spec.revision)


def _not_reached(spec: HubSpec, offline: bool, err: Exception) -> str:
    from datasets import config

    if offline or config.HF_HUB_OFFLINE:
        reason = "is not in the local cache, and offline mode is on"
    else:
        reason = f"cannot be reached on the hub and is not in the local cache ({first_line(err)})"
    return (
        f"the data set {spec.repo} {reason}: run once with a network, or give a local file (.txt .jsonl .parquet) "
        "or the built-in python-docs"
    )


@contextmanager
def hub_offline(offline: bool) -> Iterator[None]:
    """Within it no request leaves for the hub and ``load_dataset`` takes what is cached.

    ``DownloadConfig(local_files_only=True)`` is ignored by datasets 5, and the environment variables are read once at
    import; what both libraries look at during a call are these two flags, so they are set here and put back.
    """
    if not offline:
        yield
        return
    from datasets import config
    from huggingface_hub import constants

    holders: tuple[Any, ...] = (config, constants)
    before = [holder.HF_HUB_OFFLINE for holder in holders]
    try:
        for holder in holders:
            holder.HF_HUB_OFFLINE = True
        yield
    finally:
        for holder, value in zip(holders, before, strict=True):
            holder.HF_HUB_OFFLINE = value


def _from_dataset(dataset: Any, label: str, field: str | None) -> Documents:
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, dict):
        raise InputError(f"a dataset with splits {', '.join(columns)} was given: choose one, as in dataset['train']")
    if not isinstance(columns, list) or not hasattr(dataset, "__len__"):
        raise InputError(f"{label}: expected a datasets.Dataset with rows, found {type(dataset).__name__}")
    field = _choose_field(columns, field, label)
    with explaining(f"the rows of {label}:{field} cannot be read"):
        return _documents(dataset[field], label, field)


def _num_rows(dataset: Any) -> str:
    return str(len(dataset)) if hasattr(dataset, "__len__") else "?"
