"""Perplexity beside the dense model's, window by window: the text's own variation cancels."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import Any, NamedTuple

Record = dict[str, Any]
WINDOW_NLL = "window_nll"


class LogRatio(NamedTuple):
    """``ln(perplexity / dense perplexity)`` with its standard error over windows; None for a single window."""

    value: float
    stderr: float | None


def log_ratio(window_nll: Sequence[float], dense_nll: Sequence[float]) -> LogRatio:
    """Compares two models on the same windows of equally many predictions, by the mean loss of each window (nats)."""
    differences = [ours - dense for ours, dense in zip(window_nll, dense_nll, strict=True)]
    several = len(differences) > 1
    return LogRatio(fmean(differences), stdev(differences) / sqrt(len(differences)) if several else None)


def with_log_ratios(records: Sequence[Record]) -> list[Record]:
    """The records of a grid, the dense model first, with ``log_ratio`` and its error on every text.

    Models with a tokenizer of their own are left out: their windows are other text.
    """
    dense = records[0].get("perplexity", {}) if records and records[0]["variant"] is None else {}
    return [record if record["variant"] is None else _with_log_ratio(record, dense) for record in records]


def _with_log_ratio(record: Record, dense: Record) -> Record:
    if record.get("own_tokenizer", False) or "perplexity" not in record:
        return record
    rows = {text: row | _described(row, dense.get(text, {})) for text, row in record["perplexity"].items()}
    return record | {"perplexity": rows}


def _described(row: Record, dense: Record) -> Record:
    """Nothing for records of versions that kept no windows."""
    if WINDOW_NLL not in row or len(row[WINDOW_NLL]) != len(dense.get(WINDOW_NLL, ())):
        return {}
    found = log_ratio(row[WINDOW_NLL], dense[WINDOW_NLL])
    return {"log_ratio": found.value, "log_ratio_stderr": found.stderr}
