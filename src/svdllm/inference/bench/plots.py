"""Draws the figures of a benchmark as SVG text, like the paper's Figures 3 and 4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from svdllm.common.plots import COLOURS, DENSE_LINE, as_svg, line_style, make_panels, place_legend
from svdllm.inference.bench import BenchmarkRecord, CellRecord

PARTS = ("weights", "cache", "activations")


def throughput_figure(record: BenchmarkRecord) -> str:
    """Draws tokens per second with quartiles, prefill above decode, over batch size and over prompt length.

    As in the paper, the batch size varies at the shortest prompt, and the prompt length at the largest batch.
    """
    batches, prompts = record.settings["batch_sizes"], record.settings["prompts"]
    figure, axes = make_panels(2, 2, width=4.6, height=3.3)
    for axis_row, phase in zip(axes, ("prefill", "decode"), strict=True):
        for axis, varied in zip(axis_row, ("batch", "prompt"), strict=True):
            fixed = ("prompt", min(prompts)) if varied == "batch" else ("batch", max(batches))
            for number, model in enumerate(record.models):
                cells = [cell for cell in record.of(model.name) if getattr(cell, fixed[0]) == fixed[1] and cell.phases]
                style = (
                    DENSE_LINE | {"marker": "o", "markersize": 4} if model.name == record.base else line_style(number)
                )
                _line(axis, sorted(cells, key=lambda cell: getattr(cell, varied)), varied, phase, model.name, style)
            ticks = sorted(batches if varied == "batch" else prompts)
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, list(map(str, ticks)))
            axis.set_ylim(bottom=0)
            axis.set_title(f"{phase}, {fixed[0]} {fixed[1]}", fontsize=9)
            axis.set_xlabel("sequences at once" if varied == "batch" else "tokens of the prompt")
        axis_row[0].set_ylabel("tokens per second")
    place_legend(figure, axes[0][0])
    return as_svg(figure)


def memory_figure(record: BenchmarkRecord) -> str:
    """Draws the peak memory of every model as stacked bars: rows of panels by prompt length, columns by batch size."""
    batches, prompts = record.settings["batch_sizes"], record.settings["prompts"]
    figure, axes = make_panels(len(prompts), len(batches), width=3.2, height=0.9 + 0.3 * len(record.models))
    for axis_row, prompt in zip(axes, prompts, strict=True):
        for axis, batch in zip(axis_row, batches, strict=True):
            _bars(axis, [cell for cell in record.cells if (cell.batch, cell.prompt) == (batch, prompt)])
            axis.set_title(f"batch {batch}, prompt {prompt}", fontsize=9)
            axis.set_xlabel("GB")
            if axis is not axis_row[0]:
                axis.set_yticklabels([])
    place_legend(figure, axes[0][0])
    return as_svg(figure)


def _line(axis: Any, cells: Sequence[CellRecord], varied: str, phase: str, label: str, style: dict[str, Any]) -> None:
    phases = [cell.phases[phase] for cell in cells]
    speeds = [found.tokens_per_second for found in phases]
    errors = [
        [speed - found.tokens / found.seconds.upper_quartile for speed, found in zip(speeds, phases, strict=True)],
        [found.tokens / found.seconds.lower_quartile - speed for speed, found in zip(speeds, phases, strict=True)],
    ]
    axis.errorbar([getattr(cell, varied) for cell in cells], speeds, yerr=errors, label=label, **style)


def _bars(axis: Any, cells: Sequence[CellRecord]) -> None:
    names = [cell.model for cell in cells]
    starts = [0.0] * len(cells)
    for part, colour in zip(PARTS, COLOURS, strict=False):
        lengths = [0.0 if cell.memory is None else getattr(cell.memory, part) / 1e9 for cell in cells]
        axis.barh(names, lengths, left=starts, label=part, color=colour)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    for cell in cells:
        if cell.memory is None:
            axis.text(0, cell.model, " out of memory", va="center", fontsize=7)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
