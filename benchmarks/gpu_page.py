"""The page of ``gpu_suite.py``: its record as tables in Markdown."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]


def page(record: Record) -> str:
    """All steps of a record; one that failed or was left out says so."""
    facts = record["machine"]
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "cuda", "transformers", "svdllm"))
    lines = [f"# {facts['device']}", "", f"Python {facts['python']}, {versions}.", ""]
    for name, found in record["steps"].items():
        lines += [f"## {name.replace('_', ' ').capitalize()}", ""]
        if why := found.get("error") or found.get("skipped"):
            lines += [f"Not measured: {why}", ""]
        else:
            lines += [*SECTIONS[name](found), ""]
    return "\n".join(lines)


def table(heads: list[str], rows: list[list[Any]]) -> list[str]:
    return [
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
    ]


def agreement(found: Record) -> list[str]:
    text = "Largest difference of logits between checkpoints made on the device and on the CPU, over the largest logit."
    rows = [[name, f"{value:.1e}"] for name, value in found["relative_difference"].items()]
    left_out = [f"Not compared: {name} ({why})." for name, why in found["left_out"].items()]
    return [text, "", *table(["model, recipe, way of running", "relative difference"], rows), *left_out]


def compression(found: Record) -> list[str]:
    presets = [name for name in found if isinstance(found[name], dict)]
    text = f"{found['blocks']} of {found['all_blocks']} blocks, {found['samples']} x {found['seqlen']} tokens; seconds."
    stages = dict.fromkeys(stage for name in presets for stage in found[name]["seconds_by_stage"])
    rows: list[list[Any]] = [
        [stage, *(f"{found[name]['seconds_by_stage'].get(stage, 0):.1f}" for name in presets)] for stage in stages
    ]
    rows.append(["**all**", *(f"{found[name]['seconds']:.1f}" for name in presets)])
    rows.append(["planned", *(_planned(found[name]) for name in presets)])
    rows.append(
        [f"all {found['all_blocks']} blocks", *(f"{found[name]['seconds_of_all_blocks']:.0f}" for name in presets)]
    )
    for label, key in (("RAM", "ram"), ("device memory", "device")):
        planned = "planned_device_bytes" if key == "device" else "planned_peak_ram_bytes"
        cells = (f"{found[name][f'peak_{key}_bytes'] / 1e9:.2f} ({found[name][planned] / 1e9:.2f})" for name in presets)
        rows.append([f"{label}, GB (planned)", *cells])
    return [text, "", *table(["stage", *presets], rows)]


def _planned(row: Record) -> str:
    least, most = row["planned_seconds_range"]
    return f"{row['planned_seconds']:.1f} ({least:.0f} to {most:.0f})"


def decode(found: Record) -> list[str]:
    text = "One step of one token after 128 others; milliseconds, and the speed-up over the dense model."
    rows = [
        [name, *(_way(row, way) for way in ("eager", "graph")), f"{row['ideal_speedup']:.2f}"]
        for name, row in found.items()
        if isinstance(row, dict)
    ]
    return [text, "", *table(["model", "as it comes", "CUDA graph", "ideal, by bytes of the weights"], rows)]


def _way(row: Record, way: str) -> str:
    return f"{1e3 * row[way]['median']:.2f} ({row[f'{way}_speedup']:.2f})" if way in row else ""


def decomposition(found: Record) -> list[str]:
    rows = [
        [
            name,
            " x ".join(map(str, row["shape"])),
            *(f"{row[f'{path}_seconds']['median']:.3f}" for path in ("ours", "paper")),
            *(f"{row[f'{path}_relative_loss']:.6f}" for path in ("ours", "paper")),
        ]
        for name, row in found["linears"].items()
    ]
    heads = ["linear", "shape", "ours (s)", "paper (s)", "loss, ours", "loss, paper"]
    return [*table(heads, rows), "", f"A whole block: {found['speedup']:.1f} times as fast as the paper's path."]


def inference(found: Record) -> list[str]:
    rows = [[cell["batch"], cell["prompt"], *_measured(cell)] for cell in found["cells"]]
    return table(["batch", "prompt", "model", "prefill (ms)", "decode (ms a token)", "peak memory (GB)"], rows)


def latent(found: Record) -> list[str]:
    kinds = {kind: record for kind, record in found.items() if isinstance(record, dict)}
    rows = [
        [kind, *_measured(cell), f"{cell['memory']['cache'] / 1e9:.2f}"]
        for kind, record in kinds.items()
        for cell in record["cells"]
    ]
    cell = next(iter(kinds.values()))["cells"][0]
    heads = ["cache", "model", "prefill (ms)", "decode (ms a token)", "peak memory (GB)", "cache (GB)"]
    return [f"Batch {cell['batch']}, prompt {cell['prompt']}.", "", *table(heads, rows)]


def compiled(found: Record) -> list[str]:
    rows = [[name, f"{1e3 * row['median']:.2f}"] for name, row in found["seconds"].items()]
    return [*table(["model", "one token (ms)"], rows), "", f"{found['speedup']:.2f} times as fast as the dense model."]


def distillation(found: Record) -> list[str]:
    heads = ["processes", "steps", "tokens", "trained parameters", "seconds", "tokens per second"]
    row = [found["processes"], found["steps"], found["tokens"], f"{found['trained_params']:,}"]
    return table(heads, [[*row, f"{found['seconds']:.1f}", f"{found['tokens_per_second']:.0f}"]])


def _measured(cell: Record) -> list[str]:
    """Name, prefill, decode per token and peak memory; with the speed-up over the dense model."""
    if cell["error"]:
        return [cell["model"], cell["error"], "", ""]
    shown = []
    for phase, tokens in (("prefill", 1), ("decode", cell["gen"])):
        found = cell[phase]
        gain = "" if found["speed_up"] is None else f" ({found['speed_up']['median']:.2f})"
        shown.append(f"{1e3 * found['seconds']['median'] / tokens:.1f}{gain}")
    return [cell["model"], *shown, f"{cell['memory']['peak'] / 1e9:.2f}"]


SECTIONS = {
    "agreement": agreement,
    "compression": compression,
    "decode": decode,
    "decomposition": decomposition,
    "inference": inference,
    "latent": latent,
    "distillation": distillation,
    "compression_70b": compression,
    "compiled": compiled,
    "two_gpus": distillation,
}
