"""The table of what making and running each model takes: time, memory and speed beside the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]
MAKING = ("model", "made in", "peak memory")
RUNNING = ("prefill, tokens/s", "against dense", "decode, tokens/s", "against dense", "peak of inference")
NONE = "–"


def cost_table(records: Sequence[Record]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows, of finished models that were made here or whose speed was measured; no rows if none were."""
    made = [record for record in records if record["status"] == "done" and record["variant"]]
    made = [record for record in made if record.get("compression_seconds") or record.get("speed")]
    has_speed = any(record.get("speed") for record in made)
    rows = [(record["name"], _time(record), _memory(record)) for record in made]
    if not has_speed:
        return MAKING, rows
    return MAKING + RUNNING, [(*row, *_speed(record)) for row, record in zip(rows, made, strict=True)]


def cost_notes(records: Sequence[Record]) -> list[str]:
    """Says how the figures of the table were measured, and why some are missing."""
    lines = [
        "Time and memory of making a model: calibration counts where it was done, once for all ratios; a run that was "
        "interrupted shows the last part only. Peak memory is that of the whole process, and of the GPU if one is used."
    ]
    speeds = [(record["name"], record["speed"]) for record in records if record.get("speed")]
    measured = [speed for _, speed in speeds if speed["error"] is None]
    for speed in measured[:1]:
        machine = speed["machine"]
        lines.append(
            f"Speed of one sequence: a prompt of {speed['prompt']} tokens, then {speed['gen']} decode steps, in turns "
            f"with the dense model; {machine['device']}, {machine['threads']} threads, {machine['dtype']}. Against "
            "dense: speed-up, median and quartiles of the turns."
        )
    if len({(speed["prompt"], str(speed["machine"])) for speed in measured}) > 1:
        lines.append("Not all speeds were measured on one machine with one prompt length: see report.json.")
    return lines + [
        f"{name} has no speed: {speed['error'].rstrip('.')}." for name, speed in speeds if speed["error"] is not None
    ]


def _time(record: Record) -> str:
    seconds = sum(record.get("compression_seconds", {}).values())
    seconds += sum(stage["seconds"] for run in record.get("recovery") or [] for stage in run["stages"])
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s" if seconds else NONE


def _memory(record: Record) -> str:
    peaks = record.get("peak_bytes") or {}
    if not record.get("compression_seconds") or not peaks.get("ram"):
        return NONE
    on_gpu = f" + {peaks['device'] / 1e9:.2f} GB GPU" if peaks["device"] else ""
    return f"{peaks['ram'] / 1e9:.2f} GB{on_gpu}"


def _speed(record: Record) -> tuple[str, ...]:
    found = record.get("speed")
    if found is None or found["error"] is not None:
        return (NONE,) * len(RUNNING)
    cells: list[str] = []
    for phase in ("prefill", "decode"):
        measured = found["model"][phase]
        spread = measured["speed_up"]
        quartiles = f"{spread['lower_quartile']:.2f}, {spread['upper_quartile']:.2f}"
        cells += [f"{measured['tokens_per_second']:,.0f}", f"{spread['median']:.2f} [{quartiles}]"]
    own, dense = (found[name]["memory"]["peak"] / 1e6 for name in ("model", "dense"))
    return (*cells, f"{own:,.0f} MB (dense {dense:,.0f})")
