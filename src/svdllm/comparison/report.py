"""The report of a grid: one HTML page without a network, the same as Markdown, and everything as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers

from svdllm.common.files import write_atomically
from svdllm.common.version import __version__
from svdllm.comparison.costs import cost_notes, cost_table
from svdllm.comparison.figures import Figure, figures_of
from svdllm.comparison.machines import of_one_machine
from svdllm.comparison.paired import WINDOW_NLL
from svdllm.comparison.settings import Grid
from svdllm.comparison.studies import Study
from svdllm.comparison.table import Column, Entry, Group, columns_of, groups_of, has_own_tokenizer
from svdllm.comparison.variants import is_baseline

Record = dict[str, Any]
STAGES = {"analyze": "calibration, forward", "gradients": "calibration, backward", "probe": "probing"}


@dataclass(frozen=True, kw_only=True)
class GridReport:
    """The content of a report. ``command`` made the grid; ``study`` varies in it, if it is a sensitivity study."""

    grid: Grid
    records: list[Record]
    spectra: dict[str, Record] = field(default_factory=dict)
    command: str = ""
    study: Study | None = None

    @property
    def columns(self) -> list[Column]:
        return columns_of(self.records)

    @property
    def groups(self) -> list[Group]:
        return groups_of(self.records, self.columns)

    @property
    def failed(self) -> list[Record]:
        return [record for record in self.records if record["status"] != "done"]

    @property
    def missing(self) -> int:
        """Cells that are not made yet."""
        return len(self.grid.cells) - len(self.records)

    @property
    def versions(self) -> dict[str, str]:
        return {"svdllm": __version__, "torch": torch.__version__, "transformers": transformers.__version__}

    @property
    def findings(self) -> list[str]:
        """Names the best model of every ratio on the first text, and its gain."""
        if not any(record.get("perplexity") for record in self.records):
            return []
        column, lines = self.columns[0], []
        for group in self.groups[1:]:
            for row in group.rows:
                if row.entries and row.entries[0].best:
                    entry = row.entries[0]
                    gain = (
                        f", {entry.gain.strip('()')} {'of' if '/' in entry.gain else 'against'} the best of "
                        f"{self.baselines}"
                        if entry.gain
                        else ""
                    )
                    lines.append(f"{group.title} removed: {row.method} has the lowest, {_full(entry)}{gain}")
        return [f"{column.title} perplexity. {line}." for line in lines]

    @property
    def baselines(self) -> str:
        """The baselines that are in the grid."""
        return ", ".join(variant.name for variant in self.grid.variants if is_baseline(variant.name))

    @property
    def protocol(self) -> list[str]:
        """Describes how the figures were measured, in sentences."""
        measures = self.grid.measures
        lines = []
        described = [row for record in self.records for row in record.get("perplexity", {}).values()]
        if described:
            lines.append(
                f"Perplexity by the protocol {described[0]['protocol']}: {described[0]['description']}. ± is the "
                "standard error over windows."
            )
        if any("log_ratio" in row for row in described):
            lines.append(
                "ln(ppl / dense): the mean difference of a window's loss from the dense model's, in nats per token; ± "
                "is its standard error over windows, in which the difficulty of the text cancels."
            )
        if any(map(has_own_tokenizer, self.records)):
            lines.append(
                "Models with a tokenizer of their own: perplexity by token does not compare, bits per byte of text do. "
                "As many windows of other tokens may end at another place of the text."
            )
        if simulated := [record for record in self.records if record.get("simulated")]:
            stored = ", ".join(
                f"{record['name']} {record['simulated']['stored_bits_per_weight']:.2f}" for record in simulated
            )
            lines.append(
                "Simulated: the model ran with dequantised weights, and its bytes are counted by the formula of the "
                "method's authors; the ratio is the share of the linears' bytes that it saves. Bits of a weight with "
                f"everything that must be stored (masks, scales): {stored}."
            )
        if measures.tasks:
            limit = "all examples" if measures.limit is None else f"the first {measures.limit} examples"
            lines.append(f"Tasks: lm-evaluation-harness, {limit} of each; ± is the harness's standard error.")
        if (machine := self._timed[1]) is not None:
            lines.append(f"Models were made on several machines. Only the times of one are shown: {machine}.")
        calibrations = [variant.calibration for variant in self.grid.variants]
        lines += dict.fromkeys(f"Calibration: {text}." for text in calibrations if text is not None)
        if self.baselines:
            lines.append(
                f"In brackets: change against the best of {self.baselines} at the same ratio, or what part of it is "
                "left. Bold: best of the ratio, whatever the standard errors."
            )
        return lines

    @property
    def times(self) -> dict[str, dict[str, float]]:
        """Seconds by variant and stage, at the ratio for which calibration was done, on one machine."""
        times: dict[str, dict[str, float]] = {}
        for record in self._timed[0]:
            found = _stages(record)
            if sum(found.values()) > sum(times.get(record["variant"], {}).values()):
                times[record["variant"]] = found
        return times

    @property
    def _timed(self) -> tuple[list[Record], str | None]:
        """The models whose times compare, and their machine if others were made on another one."""
        return of_one_machine(record for record in self.records if record["status"] == "done" and record["variant"])

    @property
    def costs(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Headings and rows: time and memory of making each model, and its speed."""
        return cost_table(self.records)

    @property
    def cost_notes(self) -> list[str]:
        return cost_notes(self.records)

    @property
    def generations(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """Every prompt with the text that each model wrote."""
        prompts = [row["prompt"] for record in self.records for row in record.get("generations", [])]
        return [
            (
                prompt,
                [
                    (record["name"], row["text"])
                    for record in self.records
                    for row in record.get("generations", [])
                    if row["prompt"] == prompt
                ],
            )
            for prompt in dict.fromkeys(prompts)
        ]

    @property
    def recipes(self) -> dict[str, str]:
        """The settings of every variant as YAML."""
        return {variant.name: variant.describe() for variant in self.grid.variants}

    def figures(self) -> list[Figure]:
        return figures_of(self.records, self.grid, self.study, self.spectra, self.times)

    def to_dict(self) -> Record:
        return {
            "format_version": 1,
            "title": self.grid.title,
            "model": self.grid.model,
            "command": self.command,
            "versions": self.versions,
            "measures": self.grid.measures.to_dict(),
            "cells": [_shortened(record) for record in self.records],
        }


def write_report(report: GridReport, folder: Path) -> None:
    """``report.html``, ``report.md`` with its figures in ``figures``, and ``report.json``."""
    figures = report.figures()
    (folder / "figures").mkdir(exist_ok=True)
    for figure in figures:
        write_atomically(folder / "figures" / f"{figure.name}.svg", figure.svg.encode())
    for name in ("report.html", "report.md"):
        write_atomically(folder / name, _template(name).render(report=report, figures=figures, full=_full).encode())
    write_atomically(folder / "report.json", json.dumps(report.to_dict()).encode())


def read_spectra_files(folder: Path) -> dict[str, Record]:
    return {
        file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted((folder / "spectra").glob("*.json"))
    }


def _template(name: str) -> Any:
    from jinja2 import Environment, StrictUndefined

    text = (resources.files("svdllm.comparison") / f"{name}.jinja").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=name.endswith(".html"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = lambda text: " ".join(str(text).split()).replace("|", "\\|")
    return environment.from_string(text)


def _shortened(record: Record) -> Record:
    """Leaves out the harness's own document and the loss of every window, which are in the cell."""
    if "perplexity" in record:
        rows = {text: {k: v for k, v in row.items() if k != WINDOW_NLL} for text, row in record["perplexity"].items()}
        record = record | {"perplexity": rows}
    if "tasks" not in record:
        return record
    left_out = ("harness", "model")  # long; and where the model was while it was measured
    return record | {"tasks": {key: value for key, value in record["tasks"].items() if key not in left_out}}


def _full(entry: Entry) -> str:
    return " ".join(part for part in (entry.text, entry.stderr) if part)


def _stages(record: Record) -> dict[str, float]:
    seconds = dict(record["compression_seconds"])
    stages = {title: seconds.pop(name) for name, title in STAGES.items() if name in seconds}
    stages["other"] = sum(seconds.values())
    for run in record["recovery"] or []:
        stages["training"] = stages.get("training", 0.0) + sum(stage["seconds"] for stage in run["stages"])
    return stages
