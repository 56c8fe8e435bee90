"""Parses the name of a data source, without reading the source.

::

    python-docs | wikitext2 | c4 | ptb              a named set (the table below)
    FILE[:field]                                    .txt .raw .jsonl .json .parquet
    OWNER/NAME[:config][:split][:field]             a hub dataset, or a local dataset folder
    SPEC:0.7,SPEC:0.3                               a mixture, every part with its weight

An existing path wins over every other reading.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from svdllm.common.errors import InputError, did_you_mean

TEXT_SUFFIXES = (".txt", ".raw")
ROW_SUFFIXES = (".jsonl", ".json", ".parquet")
FILE_SUFFIXES = TEXT_SUFFIXES + ROW_SUFFIXES
ROW_JOINER = "\n\n"
MAX_NAME_LENGTH = 255  # of one component of a path, on every common file system


@dataclass(frozen=True, kw_only=True)
class FileSpec:
    """A local file; ``field`` is the column of a file with rows."""

    path: Path
    field: str | None = None


@dataclass(frozen=True, kw_only=True)
class HubSpec:
    """A split of a hub dataset (or of a local dataset folder), and how its rows become text.

    split: None stands for train in calibration and test in evaluation.
    field: None stands for ``text``, else ``messages``.
    data_file: the only file of the repository to use; None for all files of the split.
    per_document: windows are drawn inside single documents, not in the joined stream.
    """

    repo: str
    config: str | None = None
    split: str | None = None
    field: str | None = None
    data_file: str | None = None
    revision: str | None = None
    joiner: str = ROW_JOINER
    max_documents: int | None = None
    per_document: bool = False


@dataclass(frozen=True)
class DocsSpec:
    """The built-in text; see ``corpus.python_docs``."""


@dataclass(frozen=True, kw_only=True)
class NamedSet:
    """A short name and the splits that it stands for."""

    name: str
    calibration: HubSpec | DocsSpec
    evaluation: HubSpec | DocsSpec


@dataclass(frozen=True)
class MixtureSpec:
    """``parts``: (spec, its text, weight); the weights are positive and sum to 1."""

    parts: tuple[tuple[Spec, str, float], ...]


Spec = FileSpec | HubSpec | NamedSet | MixtureSpec


def _wikitext2(split: str) -> HubSpec:
    return HubSpec(repo="Salesforce/wikitext", config="wikitext-2-raw-v1", split=split, field="text")


def _ptb(split: str) -> HubSpec:
    # the repository itself is a loading script, which datasets 4 and later refuse: the hub keeps its rows as parquet
    return HubSpec(
        repo="ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        data_file=f"penn_treebank/{split}/0000.parquet",
        split=split,
        field="sentence",
        joiner=" ",
    )


# The sets of the paper (SVD-LLM, section 4), prepared as GPTQ (arXiv 2210.17323) prepares them.
NAMED_SETS = {
    row.name: row
    for row in (
        NamedSet(name="python-docs", calibration=DocsSpec(), evaluation=DocsSpec()),
        NamedSet(name="wikitext2", calibration=_wikitext2("train"), evaluation=_wikitext2("test")),
        NamedSet(name="ptb", calibration=_ptb("train"), evaluation=_ptb("test")),
        NamedSet(
            name="c4",
            calibration=HubSpec(
                repo="allenai/c4",
                data_file="en/c4-train.00000-of-01024.json.gz",
                split="train",
                field="text",
                per_document=True,
            ),
            evaluation=HubSpec(
                repo="allenai/c4",
                data_file="en/c4-validation.00000-of-00008.json.gz",
                split="validation",
                field="text",
                joiner=" ",
                max_documents=1100,
            ),
        ),
    )
}


def parse_spec(spec: str) -> Spec:
    """Parses the name of a data source.

    Raises:
        InputError: the grammar is broken, a name is unknown, a file is missing or of an unknown kind.
    """
    if not spec.strip():
        raise InputError("the data source is empty: give a file, a dataset name or python-docs")
    if "\n" in spec or max(map(len, spec.split("/"))) > MAX_NAME_LENGTH:
        raise InputError("the data source looks like text, not like a name or a file: give texts as a list of str")
    if Path(spec).exists() or "," not in spec:
        return _parse_single(spec)
    return _parse_mixture(spec)


def split_specs(values: Sequence[str]) -> list[str]:
    """Splits values into sources, each listed once: a value is one source, or several with commas between them.

    Names of files with commas, and mixtures, stay whole.
    """
    specs: list[str] = []
    for value in values:
        parts = [part.strip() for part in value.split(",")]
        names_a_file = Path(value).exists() or Path(value.rpartition(":")[0]).is_file()
        specs += [value] if names_a_file or all(map(_is_weighed, parts)) else parts
    return list(dict.fromkeys(specs))


def _parse_single(spec: str) -> FileSpec | HubSpec | NamedSet:
    path = Path(spec)
    if path.is_file():
        return _file_spec(path, None)
    head, colon, tail = spec.rpartition(":")
    if colon and Path(head).is_file():
        return _file_spec(Path(head), tail)
    name, *rest = _split_colons(spec)
    if path.is_dir() or Path(name).is_dir():
        return _hub_spec(spec, [spec] if path.is_dir() else [name, *rest])
    if name in NAMED_SETS:
        if rest:
            raise InputError(
                f"'{name}' is a fixed set and takes no ':{':'.join(rest)}' "
                "(weights are for mixtures of two or more parts, such as python-docs:0.7,wikitext2:0.3)"
            )
        return NAMED_SETS[name]
    if _looks_like_path(name):
        raise InputError(f"file not found: {name} (looked in {Path.cwd()})")
    if "/" in name:
        return _hub_spec(spec, [name, *rest])
    raise InputError(f"unknown data set '{name}'{did_you_mean(name, NAMED_SETS)}: {_what_is_known()}")


def _split_colons(spec: str) -> list[str]:
    """Splits at colons, but not inside brackets, as in the split ``train[:1000]``."""
    return re.split(r":(?![^\[]*\])", spec)


def _looks_like_path(name: str) -> bool:
    anchored = name.startswith((".", "~", "/")) or "\\" in name
    return anchored or name.count("/") > 1 or Path(name).suffix.lower() in FILE_SUFFIXES


def _what_is_known() -> str:
    return (
        f"expected one of {', '.join(NAMED_SETS)}, a file ({' '.join(FILE_SUFFIXES)}), "
        "or a hub dataset owner/name[:config][:split][:field]"
    )


def _file_spec(path: Path, field: str | None) -> FileSpec:
    suffix = path.suffix.lower()
    if suffix not in FILE_SUFFIXES:
        raise InputError(f"{path}: a file of kind '{suffix}' cannot be read, expected {' '.join(FILE_SUFFIXES)}")
    if field is not None and suffix in TEXT_SUFFIXES:
        raise InputError(f"{path} is plain text and has no field ':{field}': leave it out")
    if field == "":
        raise InputError(f"{path}: the field after ':' is empty: name a column, or leave the ':' out")
    return FileSpec(path=path, field=field)


def _hub_spec(spec: str, parts: list[str]) -> HubSpec:
    if len(parts) > 4:
        raise InputError(f"'{spec}' has {len(parts)} parts, expected at most 4: owner/name[:config][:split][:field]")
    repo, config, split, field = (parts + [""] * 3)[:4]
    if not Path(repo).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise InputError(f"'{repo}' is not the name of a hub dataset, expected owner/name")
    return HubSpec(repo=repo, config=config or None, split=split or None, field=field or None)


def _parse_mixture(spec: str) -> MixtureSpec:
    weighed = [_split_weight(part.strip(), spec) for part in spec.split(",")]
    total = math.fsum(weight for _, weight in weighed)
    return MixtureSpec(tuple((_parse_single(text), text, weight / total) for text, weight in weighed))


def _is_weighed(part: str) -> bool:
    """Whether a text ends with a weight, as the part of a mixture does."""
    return re.fullmatch(r".+:\d*\.?\d+", part) is not None


def _split_weight(part: str, mixture: str) -> tuple[str, float]:
    text, colon, last = part.rpartition(":")
    if not colon or not text or Path(part).exists():
        raise InputError(
            f"the part '{part}' of the mixture '{mixture}' has no weight: all parts need one, as in a:0.7,b:0.3"
        )
    try:
        weight = float(last)
    except ValueError as err:
        raise InputError(
            f"the weight '{last}' of the part '{part}' is not a number: "
            "the last ':' of every part of a mixture is its weight, as in a:0.7,b:0.3"
        ) from err
    if not math.isfinite(weight) or weight <= 0:
        raise InputError(
            f"the weight {last} of the part '{part}' is not positive: remove the part, or raise its weight"
        )
    return text, weight
