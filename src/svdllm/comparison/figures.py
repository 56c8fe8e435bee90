"""The figures of a report: which there are, with titles and captions; ``plots`` draws them."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from svdllm.comparison import plots
from svdllm.comparison.settings import Grid, file_name_of
from svdllm.comparison.studies import Study

Record = dict[str, Any]
FAVOURITE = "svd-llm"  # whose spectra are shown, if there are several


@dataclass(frozen=True, kw_only=True)
class Figure:
    name: str
    title: str
    caption: str
    svg: str

    @property
    def data_uri(self) -> str:
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg.encode()).decode()}"


def figures_of(
    records: Sequence[Record],
    grid: Grid,
    study: Study | None,
    spectra: Mapping[str, Record],
    times: dict[str, dict[str, float]],
) -> list[Figure]:
    """All figures that the records are enough for.

    Args:
        spectra: singular values by variant, as ``read_spectra_files`` returns them.
        times: seconds by variant and stage.
    """
    made = [record for record in records if record["status"] == "done" and record["variant"]]
    figures: list[Figure] = []
    if made and grid.measures.texts:
        figures += _perplexity(records) if study is None else [_study(records, study)]
    if any(record["linears"] and not record["recovery"] for record in made):
        figures += _linears(records)
    figures += _spectra(grid, spectra)
    if times:
        caption = "Calibration is done once for all ratios; a run that was interrupted shows the last part only."
        figures.append(Figure(name="time", title="Time to compress", caption=caption, svg=plots.time_figure(times)))
    return figures


def _study(records: Sequence[Record], study: Study) -> Figure:
    svg = plots.study_figure(records, study.axis, study.numeric)
    return Figure(name="study", title="Sensitivity", caption=study.summary, svg=svg)


def _perplexity(records: Sequence[Record]) -> Iterator[Figure]:
    for against in ("ratio", "bytes"):
        yield Figure(
            name=f"perplexity-{against}",
            title=f"Perplexity against {against}",
            caption="Bars are standard errors over windows; the broken line is the dense model.",
            svg=plots.perplexity_figure(records, against),
        )


def _linears(records: Sequence[Record]) -> Iterator[Figure]:
    for quantity, title in (("params", "Where the parameters are"), ("kept_energy", "Kept energy")):
        yield Figure(
            name=f"linears-{quantity}",
            title=title,
            caption="Blocks from left to right, kinds of linears from top to bottom.",
            svg=plots.heat_map_figure(records, quantity),
        )


def _spectra(grid: Grid, spectra: Mapping[str, Record]) -> Iterator[Figure]:
    names = [(variant.base or variant).name for variant in grid.variants]
    shown = [name for name in names if file_name_of(name) in spectra]
    if not shown:
        return
    variant = FAVOURITE if FAVOURITE in shown else shown[0]
    yield Figure(
        name="spectra",
        title="Spectra",
        caption=f"Singular values of every weight in the metric of {variant}: a line for each block, from the first "
        "(dark) to the last (bright).",
        svg=plots.spectra_figure(spectra[file_name_of(variant)]),
    )
