"""The table of a grid, in the layout of the paper's Table 1: ratio by ratio, best in bold, gains over the baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from svdllm.comparison.settings import DENSE
from svdllm.comparison.variants import is_baseline
from svdllm.evaluation.perplexity import perplexity_text
from svdllm.evaluation.tasks.record import mean_and_error

Record = dict[str, Any]
NEAR = 0.01  # a model made elsewhere is compared with ours if its ratio is that near to one asked for


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One figure of one model."""

    value: float
    stderr: float | None = None


@dataclass(frozen=True, kw_only=True)
class Column:
    """A measured quantity.

    ``gain`` describes a value relative to the best baseline's. Values ``by_token`` of other tokens are not compared.
    """

    title: str
    lower_is_better: bool
    of: Callable[[Record], Measurement | None]
    show: Callable[[float], str]
    gain: Callable[[float, float], str] | None = None
    by_token: bool = False

    @property
    def heading(self) -> str:
        return f"{self.title} {'↓' if self.lower_is_better else '↑'}"


@dataclass(kw_only=True)
class Entry:
    text: str
    stderr: str = ""
    gain: str = ""
    is_gain: bool = False  # whether ``gain`` is an improvement
    best: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """``error`` says why a model is missing; it has no entries then."""

    method: str
    params: str = ""
    size: str = ""
    entries: list[Entry] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The models of one ratio."""

    title: str
    rows: list[Row]


def columns_of(records: Sequence[Record]) -> list[Column]:
    """Perplexities, then accuracies and their average, then the other scores of tasks."""
    texts = dict.fromkeys(text for record in records for text in record.get("perplexity", {}))
    scores = {
        score["task"]: score
        for record in records
        for score in record.get("tasks", {}).get("scores", [])
        if score.get("group") is None  # a group counts once, and its members do not
    }
    accuracies = [task for task, score in scores.items() if score["main"]["name"] == "acc"]
    others = [task for task in scores if task not in accuracies]
    compared = [text for text in texts if any(_log_ratio(record, text) for record in records)]
    columns = _perplexities(texts, compared, by_bytes=any(map(has_own_tokenizer, records)))
    columns += [_task(task, scores[task], None) for task in accuracies]
    if len(accuracies) > 1:
        columns.append(
            Column(
                title="average",
                lower_is_better=False,
                of=lambda r: _average(r, accuracies),
                show=_share,
                gain=_relative,
            )
        )
    return columns + [_task(task, scores[task], _difference) for task in others]


def _perplexities(texts: Iterable[str], compared: Iterable[str], *, by_bytes: bool) -> list[Column]:
    """Perplexity on every text, beside the dense model's if ``compared``, and bits per byte where tokenizers differ."""
    names = text_names(texts)
    columns = [
        Column(
            title=names[text],
            lower_is_better=True,
            of=lambda record, text=text: _perplexity(record, text),
            show=perplexity_text,
            gain=_relative,
            by_token=True,
        )
        for text in texts
    ]
    columns += [
        Column(
            title=f"{names[text]}, ln(ppl / dense)",
            lower_is_better=True,
            of=lambda record, text=text: _log_ratio(record, text),
            show=_share,
        )
        for text in compared
    ]
    if by_bytes:
        columns += [
            Column(
                title=f"{names[text]}, bits per byte",
                lower_is_better=True,
                of=lambda record, text=text: _bits_per_byte(record, text),
                show=_share,
                gain=_relative,
            )
            for text in texts
        ]
    return columns


def has_own_tokenizer(record: Record) -> bool:
    """Whether a model has other tokens than the dense one."""
    return record.get("own_tokenizer", False)


def groups_of(records: Sequence[Record], columns: Sequence[Column]) -> list[Group]:
    """The dense model, then the others by ratio; a model made elsewhere stands beside the nearest ratio asked for."""
    asked = sorted({record["ratio"] for record in records if record["ratio"] is not None})
    groups: dict[float, list[Record]] = {}
    for record in records:
        groups.setdefault(_place(record, asked), []).append(record)
    return [Group(title=_title(place), rows=_rows(groups[place], columns, place)) for place in sorted(groups)]


def removed(record: Record) -> float | None:
    """The ratio asked for or, of a model made elsewhere, the share of parameters that it lacks; None if unknown."""
    return record["ratio"] if record["ratio"] is not None else record.get("achieved_ratio")


def _place(record: Record, asked: Sequence[float]) -> float:
    """The ratio of a record's group: 0 for the dense model, infinity for a model of unknown ratio."""
    if record["variant"] is None:
        return 0.0
    if (ratio := removed(record)) is None:
        return math.inf
    nearest = min(asked, key=lambda other: abs(other - ratio), default=ratio)
    return nearest if abs(nearest - ratio) <= NEAR else ratio


def _title(place: float) -> str:
    return "unknown" if math.isinf(place) else f"{place * 100:.4g} %"


def text_names(texts: Iterable[str]) -> dict[str, str]:
    """Short names of texts: files lose their folders, unless two would have one name."""
    short = {text: text.replace("\\", "/").rsplit("/", 1)[-1] for text in texts}
    return short if len(set(short.values())) == len(short) else {text: text for text in short}


def _rows(members: Sequence[Record], columns: Sequence[Column], place: float) -> list[Row]:
    rows = [_row(record, columns, place) for record in members]
    compared = [(record, row) for record, row in zip(members, rows, strict=True) if row.entries and record["variant"]]
    for position, column in enumerate(columns):
        values = [
            (found.value, record, row)
            for record, row in compared
            if (found := column.of(record)) is not None and not (column.by_token and has_own_tokenizer(record))
        ]
        if not values:
            continue
        sign = 1 if column.lower_is_better else -1
        best = min(sign * value for value, _, _ in values)
        baselines = [sign * value for value, record, _ in values if is_baseline(record["variant"])]
        for value, record, row in values:
            entry = row.entries[position]
            entry.best = len(values) > 1 and sign * value == best
            if column.gain is not None and baselines and not is_baseline(record["variant"]):
                entry.gain = column.gain(value, sign * min(baselines))
                entry.is_gain = sign * value < min(baselines)
    return rows


def _row(record: Record, columns: Sequence[Column], place: float) -> Row:
    method, ratio = record["variant"] or DENSE, removed(record)
    if record["ratio"] is None and ratio is not None and _title(ratio) != _title(place):
        method += f" ({_title(ratio)})"
    if record["status"] != "done":
        return Row(method=method, error=f"{record['error']['type']}: {record['error']['message']}")
    entries = []
    for column in columns:
        found = column.of(record)
        if found is None:
            entries.append(Entry(text="–"))
        else:
            stderr = "" if found.stderr is None else f"± {column.show(found.stderr)}"
            entries.append(Entry(text=column.show(found.value), stderr=stderr))
    params, size = f"{record['params'] / 1e6:,.1f} M", f"{record['weight_bytes'] / 1e6:,.0f} MB"
    if (simulated := record.get("simulated")) is not None:
        size += f" (simulated, {simulated['bits_per_weight']:.2f} bits)"
    return Row(method=method, params=params, size=size, entries=entries)


def _perplexity(record: Record, text: str) -> Measurement | None:
    found = record.get("perplexity", {}).get(text)
    return None if found is None else Measurement(value=found["perplexity"], stderr=found["stderr"])


def _log_ratio(record: Record, text: str) -> Measurement | None:
    found = record.get("perplexity", {}).get(text, {})
    value = found.get("log_ratio")
    return None if value is None else Measurement(value=value, stderr=found["log_ratio_stderr"])


def _bits_per_byte(record: Record, text: str) -> Measurement | None:
    found = record.get("perplexity", {}).get(text, {})
    bits = found.get("bits_per_byte")
    return None if bits is None else Measurement(value=bits, stderr=found["bits_per_byte_stderr"])


def _score(record: Record, task: str) -> Measurement | None:
    for score in record.get("tasks", {}).get("scores", []):
        if score["task"] == task and score["main"]["value"] is not None:
            return Measurement(value=score["main"]["value"], stderr=score["main"]["stderr"])
    return None


def _average(record: Record, tasks: Sequence[str]) -> Measurement | None:
    found = [_score(record, task) for task in tasks]
    known = [(measured.value, measured.stderr) for measured in found if measured is not None]
    if len(known) < len(tasks):
        return None
    mean, stderr = mean_and_error(known)
    return Measurement(value=mean, stderr=stderr)


def _task(task: str, score: Record, gain: Callable[[float, float], str] | None) -> Column:
    return Column(
        title=task,
        lower_is_better=not score["main"]["higher_is_better"],
        of=lambda record: _score(record, task),
        show=_share,
        gain=gain,
    )


def _share(value: float) -> str:
    return f"{value:.3f}"


def _relative(value: float, baseline: float) -> str:
    if baseline <= 0:
        return ""
    change = value / baseline - 1
    if change < -0.99 and value > 0:  # a share of 100 % would say nothing
        return f"(1/{baseline / value:,.0f})"
    if abs(change) < 0.005:
        return "(0%)"
    return f"({'↓' if change < 0 else '↑'}{abs(change) * 100:.0f}%)"


def _difference(value: float, baseline: float) -> str:
    return f"({value - baseline:+.3f})"
