"""Gives all plots the same look: colours, panels, legends and SVG text."""

from __future__ import annotations

import io
from typing import Any

# The colours of Okabe and Ito, which differ for any kind of colour vision; black is the dense model.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#666666")
MARKERS = "osD^vP*X"
DENSE_LINE: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1}


def line_style(number: int) -> dict[str, Any]:
    """Colour and marker of the line with this number."""
    colour = COLOURS[number % len(COLOURS)]
    return {"color": colour, "marker": MARKERS[number % len(MARKERS)], "markersize": 4, "linewidth": 1.2, "capsize": 2}


def make_panels(rows: int, columns: int, *, width: float, height: float) -> Any:
    """Makes a figure and a grid of panels (``rows x columns``), each ``width x height`` inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for row in axes:
        for axis in row:
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(visible=True, linewidth=0.4, alpha=0.4)
            axis.set_axisbelow(True)
    return figure, axes


def place_legend(figure: Any, axis: Any) -> None:
    """Puts the legend of one panel below all of them."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def as_svg(figure: Any) -> str:
    """Renders a figure as SVG text, the same text for the same figure."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "svdllm", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()
