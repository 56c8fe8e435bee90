"""Figures of a grid, as SVG text. Imports matplotlib late: it comes with the extra ``report``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from svdllm.common.plots import COLOURS, DENSE_LINE, as_svg, line_style, make_panels, place_legend
from svdllm.comparison.table import removed, text_names

Record = dict[str, Any]


def perplexity_figure(records: Sequence[Record], against: str) -> str:
    """Perplexity with its standard error, ``against`` the ratio removed or the bytes of the weight files."""
    done = [record for record in records if record["status"] == "done"]
    names = text_names(text for record in done for text in record["perplexity"])
    figure, axes = make_panels(1, max(len(names), 1), width=5.2, height=3.8)
    if against == "ratio":
        done = [record for record in done if record["variant"] is None or removed(record) is not None]
    x_of = (lambda r: 100 * (removed(r) or 0)) if against == "ratio" else (lambda r: r["weight_bytes"] / 1e6)
    for axis, (text, name) in zip(axes[0], names.items(), strict=False):
        for number, (variant, rows) in enumerate(_by_variant(done).items()):
            points = _sorted((x_of(row), row["perplexity"][text]) for row in rows if text in row["perplexity"])
            axis.errorbar(
                [x for x, _ in points],
                [found["perplexity"] for _, found in points],
                yerr=_errors([found for _, found in points]),
                label=variant,
                **line_style(number),
            )
        for record in done:
            if record["variant"] is None and text in record["perplexity"]:
                axis.axhline(record["perplexity"][text]["perplexity"], label="dense", **DENSE_LINE)
        axis.set_yscale("log")
        axis.set_title(name)
        axis.set_xlabel("removed of the linears' parameters (%)" if against == "ratio" else "weight files (MB)")
    axes[0][0].set_ylabel("perplexity")
    place_legend(figure, axes[0][0])
    return as_svg(figure)


def study_figure(records: Sequence[Record], axis_name: str, numeric: bool) -> str:
    """Perplexity over what varies, a line for each ratio; variants are named ``<what> <value>``."""
    done = [record for record in records if record["status"] == "done"]
    names = text_names(text for record in done for text in record["perplexity"])
    variants = list(_by_variant(records))
    positions = {v: float(v.rsplit(" ", 1)[-1]) if numeric else place for place, v in enumerate(variants)}
    figure, axes = make_panels(1, max(len(names), 1), width=5.2, height=3.8)
    ratios = sorted({record["ratio"] for record in done if record["ratio"] is not None})
    for axis, (text, name) in zip(axes[0], names.items(), strict=False):
        for number, ratio in enumerate(ratios):
            points = _sorted((positions[r["variant"]], r["perplexity"][text]) for r in done if r["ratio"] == ratio)
            axis.errorbar(
                [x for x, _ in points],
                [found["perplexity"] for _, found in points],
                yerr=_errors([found for _, found in points]),
                label=f"{ratio * 100:.4g} %",
                **line_style(number),
            )
        axis.set_title(name)
        axis.set_xlabel(axis_name)
        values = [r["perplexity"][text]["perplexity"] for r in done]
        if max(values) > 10 * min(values):
            axis.set_yscale("log")
        places = list(positions.values())
        if numeric and min(places) > 0 and max(places) >= 8 * min(places):
            axis.set_xscale("log", base=2)
        if numeric:
            axis.set_xticks(places, [f"{place:g}" for place in places])
        else:
            axis.set_xticks(places, [text_names([v])[v] for v in variants], rotation=30, ha="right")
    axes[0][0].set_ylabel("perplexity")
    place_legend(figure, axes[0][0])
    return as_svg(figure)


def heat_map_figure(records: Sequence[Record], quantity: str) -> str:
    """Every linear of every compressed model: blocks from left to right, kinds of linears from top to bottom.

    ``quantity`` is ``params`` (share of the dense linear's that is kept) or ``kept_energy``.
    """
    done = [record for record in records if record["status"] == "done" and record["linears"] and not record["recovery"]]
    variants = list(_by_variant(done))
    ratios = sorted({record["ratio"] for record in done})
    kinds = list(dict.fromkeys(row["name"].rsplit(".", 1)[-1] for record in done for row in record["linears"]))
    num_blocks = max(row["block"] for record in done for row in record["linears"]) + 1
    figure, axes = make_panels(len(variants), len(ratios), width=2.6, height=0.5 + 0.17 * len(kinds))
    image = None
    for axis_row, variant in zip(axes, variants, strict=True):
        for axis, ratio in zip(axis_row, ratios, strict=True):
            axis.set_xticks([])
            axis.set_yticks(range(len(kinds)), kinds if axis is axis_row[0] else [], fontsize=6)
            axis.set_title(f"{variant}, {ratio * 100:.4g} %", fontsize=8)
            found = [record for record in done if (record["variant"], record["ratio"]) == (variant, ratio)]
            axis.set_visible(bool(found))
            grid = [[float("nan")] * num_blocks for _ in kinds]
            for record in found:
                for row in record["linears"]:
                    grid[kinds.index(row["name"].rsplit(".", 1)[-1])][row["block"]] = _shade(row, quantity)
            image = axis.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
            for side in axis.spines.values():
                side.set_visible(False)
    title = "parameters kept (1: left dense)" if quantity == "params" else "energy kept, in the method's own metric"
    everywhere = [axis for row in axes for axis in row]
    figure.colorbar(image, ax=everywhere, label=title, location="bottom", shrink=min(1.0, 2 / len(ratios)), aspect=40)
    return as_svg(figure)


def spectra_figure(spectra: Record) -> str:
    """Singular values of the weights in the metric of the method, a line for each block (the paper's Figure 6)."""
    import matplotlib

    by_kind: dict[str, list[Record]] = {}
    for name, spectrum in spectra.items():
        by_kind.setdefault(name.rsplit(".", 1)[-1], []).append(spectrum)
    columns = min(4, len(by_kind))
    figure, axes = make_panels(-(-len(by_kind) // columns), columns, width=3, height=2.6)
    panels = [axis for row in axes for axis in row]
    colours = matplotlib.colormaps["viridis"]
    for axis, (kind, blocks) in zip(panels, by_kind.items(), strict=False):
        for number, spectrum in enumerate(blocks):
            axis.plot(
                spectrum["positions"],
                [value or float("nan") for value in spectrum["singular_values"]],
                color=colours(number / max(1, len(blocks) - 1)),
                linewidth=0.8,
            )
        axis.set_title(kind)
        axis.set_xscale("log")
        axis.set_yscale("log")
    for axis in panels[len(by_kind) :]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_ylabel("singular value")
    return as_svg(figure)


def time_figure(times: dict[str, dict[str, float]]) -> str:
    """Seconds by variant and stage, stacked (the paper's Table 13)."""
    stages = list(dict.fromkeys(stage for row in times.values() for stage in row))
    figure, axes = make_panels(1, 1, width=7.5, height=0.9 + 0.42 * len(times))
    axis = axes[0][0]
    starts = dict.fromkeys(times, 0.0)
    for number, stage in enumerate(stages):
        lengths = [row.get(stage, 0.0) for row in times.values()]
        axis.barh(list(times), lengths, left=list(starts.values()), label=stage, color=COLOURS[number % len(COLOURS)])
        starts = {name: starts[name] + length for name, length in zip(times, lengths, strict=True)}
    axis.invert_yaxis()
    axis.set_xlabel("seconds")
    axis.grid(axis="y", visible=False)
    place_legend(figure, axis)
    return as_svg(figure)


def _sorted(points: Iterable[tuple[float, Record]]) -> list[tuple[float, Record]]:
    return sorted(points, key=lambda point: point[0])


def _errors(measured: Sequence[Record]) -> list[list[float]]:
    """Down and up: of the mean log likelihood, by one standard error, so that no bar ends below zero."""
    shares = [(found["perplexity"], (found["stderr"] or 0) / found["perplexity"]) for found in measured]
    return [
        [value * -math.expm1(-share) for value, share in shares],
        [value * math.expm1(share) for value, share in shares],
    ]


def _shade(row: Record, quantity: str) -> float:
    if quantity == "params":
        return row["params"] / (row["out_features"] * row["in_features"])
    return row["kept_energy"]


def _by_variant(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        if record["variant"] is not None:
            found.setdefault(record["variant"], []).append(record)
    return found
