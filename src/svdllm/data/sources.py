"""Reads documents from any source: files, hub datasets, the built-in text, and objects in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from svdllm.common.errors import InputError, explaining
from svdllm.common.extras import require_extra
from svdllm.data.checks import check_texts
from svdllm.data.corpus import python_docs
from svdllm.data.files import CHAT_FIELD, DEFAULT_FIELDS, json_rows, parquet_file, read_text, refuse_rows
from svdllm.data.hub_datasets import load_split
from svdllm.data.specs import ROW_JOINER, TEXT_SUFFIXES, DocsSpec, FileSpec, HubSpec, MixtureSpec, NamedSet, Spec


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Rows that become one text: each is a str, or a chat (a list of role/content dicts).

    joiner: text between two rows.
    per_document: windows are drawn inside single rows.
    promises_chats: the name of the column says that it holds chats.
    """

    rows: Sequence[Any]
    source: str
    joiner: str = ROW_JOINER
    per_document: bool = False
    promises_chats: bool = False

    def row(self, index: int) -> Any:
        """Returns one row, which a data set may read only now."""
        with explaining(f"{self.source}, row {index} cannot be read"):
            return self.rows[index]

    def all_rows(self) -> list[Any]:
        with explaining(f"the rows of {self.source} cannot be read"):
            return list(self.rows)


def documents_of(source: Any) -> Documents:
    """Makes documents of an object in memory: a list of texts or a data set."""
    if isinstance(source, (list, tuple)):
        check_texts(source)
        return Documents(rows=source, source=f"list of {len(source)} texts")
    return _from_dataset(source, f"datasets.Dataset of {_num_rows(source)} rows", field=None)


def documents_of_spec(spec: Spec, *, evaluation: bool, offline: bool) -> Documents:
    """Reads the documents that ``spec`` names.

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
    """Reads all columns of a file or data set with rows; none for plain text.

    Raises:
        InputError: the file or the dataset cannot be read.
    """
    if isinstance(spec, HubSpec):
        require_extra("datasets", f"the data set '{spec.repo}'")
        dataset = load_split(spec, spec.split or ("test" if evaluation else "train"), offline=offline)
        with explaining(f"the rows of the data set {spec.repo} cannot be read"):
            return list(dataset)
    if not isinstance(spec, FileSpec) or spec.path.suffix.lower() in TEXT_SUFFIXES:
        return []
    if spec.path.suffix.lower() == ".parquet":
        with parquet_file(spec.path) as file:
            return file.read().to_pylist()
    return json_rows(spec.path, whole_file_may_be_a_list=spec.path.suffix.lower() == ".json")


def _from_file(spec: FileSpec) -> Documents:
    path, suffix = spec.path, spec.path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        text = read_text(path)
        refuse_rows(text, path)
        return Documents(rows=[text], source=str(path))
    if suffix == ".parquet":
        return _from_parquet(path, spec.field)
    rows = json_rows(path, whole_file_may_be_a_list=suffix == ".json")
    columns = sorted({name for row in rows for name in row})
    field = _choose_field(columns, spec.field, str(path))
    for number, row in enumerate(rows):
        if field not in row:
            raise InputError(f"{path}: row {number} has no column '{field}', it has: {', '.join(sorted(row))}")
    return _documents([row[field] for row in rows], str(path), field)


def _from_parquet(path: Path, field: str | None) -> Documents:
    with parquet_file(path) as file:
        field = _choose_field(file.schema_arrow.names, field, str(path))
        rows = file.read(columns=[field]).column(field).to_pylist()
    return _documents(rows, str(path), field)


def _from_hub(spec: HubSpec, *, evaluation: bool, offline: bool) -> Documents:
    require_extra("datasets", f"the data set '{spec.repo}'")
    split = spec.split or ("test" if evaluation else "train")
    dataset = load_split(spec, split, offline=offline)
    if spec.max_documents is not None:
        dataset = dataset.select(range(min(spec.max_documents, len(dataset))))
    label = ":".join(part for part in (spec.repo, spec.config or spec.data_file, split) if part)
    documents = _from_dataset(dataset, label, spec.field)
    return replace(documents, joiner=spec.joiner, per_document=spec.per_document)


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


def _documents(rows: Sequence[Any], source: str, field: str) -> Documents:
    return Documents(rows=rows, source=f"{source}:{field}", promises_chats=field == CHAT_FIELD)


def _choose_field(columns: Sequence[str], asked: str | None, where: str) -> str:
    wanted = DEFAULT_FIELDS if asked is None else (asked,)
    for field in wanted:
        if field in columns:
            return field
    names = " or ".join(f"'{field}'" for field in wanted)
    raise InputError(f"{where} has no column {names}, it has: {', '.join(columns)}; name one after a ':'")
