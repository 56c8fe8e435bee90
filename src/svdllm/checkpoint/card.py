"""The model card of a checkpoint: its README.md, in Markdown for the hub."""

from __future__ import annotations

from collections import Counter
from typing import Any

from transformers import PreTrainedConfig

from svdllm.checkpoint.report import form_of
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.quantized_sources.methods import QuantizedSource
from svdllm.models.wrapped import is_wrapper

IMAGE_TEXT = "AutoModelForImageTextToText"
SHOWN_LINEARS = 5  # those that lost most
FORMS = {
    "pair": "as pairs of factors (`svd_u @ svd_v`)",
    "packed": "packed (pivot rows or columns, and how the others are made of them)",
    "narrow": "narrower (fewer heads, or fewer inner features of an MLP)",
    "dropped": "removed with the attention or MLP that they belong to",
    **{f"int{bits}": f"in {bits} bits" for bits in range(8, 1, -1)},
    **{f"int{bits}-corrected": f"in {bits} bits with a low-rank correction" for bits in (4, 3, 2)},
    "pair-int8": "as pairs of factors in 8 bits",
    "packed-int8": "packed, in 8 bits",
}


def model_card(report: dict[str, Any], config: PreTrainedConfig) -> str:
    """Describes what a model is, how it was made and how to load it.

    It holds no times, so that two runs of one recipe write the same card.
    """
    made = (_pruning(report),) if "pruning" in report else (_making(report), _worst_linears(report))
    sections = (
        _overview(report, config),
        _forms(report),
        _loading(report, config),
        _quantization(report),
        _smaller_sizes(report),
        *made,
    )
    return "\n".join(section for section in sections if section)


def _reads_images(config: PreTrainedConfig) -> bool:
    return IMAGE_TEXT in (getattr(config, "auto_map", None) or {})


def _overview(report: dict[str, Any], config: PreTrainedConfig) -> str:
    counts = Counter(map(form_of, report["linears"]))
    forms = "; ".join(f"{counts[form]} {text}" for form, text in FORMS.items() if counts[form])
    removed = 1 - report["params"] / report["dense_params"]
    trained = "It was not trained after compression."
    if history := report.get("recovery"):
        trained = "After compression it was trained: " + "; ".join(map(recovery_text, history)) + "."
    model = report["source"]["model"]
    saved = report["achieved_ratio"] or 1 - report["file_bytes"] / report["dense_file_bytes"]  # of few bits alone
    task = "image-text-to-text" if _reads_images(config) else "text-generation"
    return f"""---
library_name: transformers
pipeline_tag: {task}
tags: [svdllm, low-rank, compression]
---

# {model}, compressed by {saved:.0%}

{model} with {len(report["linears"]) - counts["dense"]} of its linear layers made smaller
(method `{report["method"]}`{_paper(report)}): {forms or "none"}.
{counts["dense"]} stay dense.

| | dense | this model |
|---|---|---|
| parameters | {report["dense_params"]:,} | {report["params"]:,} ({removed:.1%} fewer) |
| weight files | {report["dense_file_bytes"] / 1e6:,.1f} MB | {report["file_bytes"] / 1e6:,.1f} MB |
| parameters of the linears removed | | {report["achieved_ratio"]:.2%} |

{trained} Measure its quality on your own text before you use it:
`svdllm eval FOLDER --base ORIGINAL --ppl your-text.txt`.
"""


def _paper(report: dict[str, Any]) -> str:
    return "" if "pruning" in report else ", [SVD-LLM](https://arxiv.org/abs/2403.07378)"


def _forms(report: dict[str, Any]) -> str:
    """The form of every kind of linear, where some are in few bits."""
    if not report.get("bytes_by_part", {}).get("scales"):
        return ""
    kinds: dict[str, Counter[str]] = {}
    for row in report["linears"]:
        kinds.setdefault(row["name"].rpartition(".")[2], Counter())[form_of(row)] += 1
    kinds |= {name: Counter([chosen["form"]]) for name, chosen in report["vocabulary"].items()}
    rows = "\n".join(
        f"| `{kind}` | {', '.join(f'{number} {form}' for form, number in counts.most_common())} |"
        for kind, counts in kinds.items()
    )
    parts = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in report["bytes_by_part"].items() if size)
    return f"""## Bits

{report["bits_per_weight"]:.2f} bits per weight of the linears, scales included. Weight files: {parts}.

| linears | forms |
|---|---|
{rows}
"""


def _loading(report: dict[str, Any], config: PreTrainedConfig) -> str:
    if LowRankInfo.of(config) is None:
        return """## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")  # needs the package compressed-tensors
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```
"""
    to_dense = (
        ""
        if report.get("quantization")
        else (" A plain\nmodel of the original architecture and size: `svdllm export FOLDER -o DENSE`.")
    )
    wraps = is_wrapper(config)
    reader, variable = ("AutoProcessor", "processor") if wraps else ("AutoTokenizer", "tokenizer")
    auto = IMAGE_TEXT if _reads_images(config) else "AutoModelForCausalLM"
    copied = (
        "\nOnly its language model was compressed, on text; everything else is the original's, bit for bit.\n"
        if wraps
        else ""
    )
    return f"""## Load

```python
import svdllm  # registers the model type {config.model_type}
from transformers import {auto}, {reader}

model = {auto}.from_pretrained("FOLDER")
{variable} = {reader}.from_pretrained("FOLDER")
```
{copied}
Without svdllm installed, pass `trust_remote_code=True`: the code files in this folder are self-contained.{to_dense}
"""


def _quantization(report: dict[str, Any]) -> str:
    if entry := report.get("quantization"):
        return f"""## Quantised

Its linears are stored as {quantization_text(entry)}. Loading them needs the package
{entry.get("format", "torchao")}, on a CPU or a GPU. Before that the weight files had
{entry["unquantized_file_bytes"] / 1e6:,.1f} MB.
"""
    if later := report.get("quantized_file_bytes"):
        bits, target = report["recipe"]["factor_bits"], report["recipe"]["target_size"]
        return f"""## Quantise

Its ranks were chosen for {bits} bits: `svdllm quantize FOLDER -o SMALLER --bits {bits} --format torchao` makes
weight files of {later / 1e6:,.1f} MB of it, of the {target / 1e6:,.1f} MB that they may have.
"""
    return ""


def _smaller_sizes(report: dict[str, Any]) -> str:
    if not report["recipe"].get("elastic"):
        return ""
    ratio = report["recipe"]["ratio"]
    return f"""## Smaller sizes

This checkpoint is elastic: any ratio R from {ratio} can be made of it in seconds, without the original model or
calibration text, by `svdllm slice FOLDER --ratio R -o SMALLER`, or loaded by `svdllm.load_model("FOLDER", ratio=R)`.
The files `svdllm/elastic*` are for this only.
"""


def _pruning(report: dict[str, Any]) -> str:
    return f"""## How it was made

- Source: {_source(report)}
- Method: {report["method"]}, a published method of pruning, as `svdllm prune` implements it
- Calibration: {_calibration(report)}
- Versions: {_versions(report)}
- `svdllm/recipe.yaml` has the settings, `svdllm/report.json` what was removed of every layer.
"""


def _source(report: dict[str, Any]) -> str:
    source = report["source"]
    revision = f", revision {source['revision']}" if source["revision"] else ""
    quantized = report.get("quantized_source")
    stored = f"; {QuantizedSource(**quantized).text}" if quantized else ""
    return f"{source['model']}{revision}, weights `{source['weights_fingerprint'][:16]}`{stored}"


def _versions(report: dict[str, Any]) -> str:
    return ", ".join(f"{name} {report['versions'][name]}" for name in ("svdllm", "torch", "transformers"))


def _making(report: dict[str, Any]) -> str:
    recipe = report["recipe"]
    streams = "compressed" if recipe["calibration_mode"] == "sequential" else "dense"
    return f"""## How it was made

- Source: {_source(report)}
- Calibration: {_calibration(report)}
- Metric: {recipe["metric"]}; ranks: {report["allocation"]["name"]}; inputs of the {streams} model
- Versions: {_versions(report)}
- `svdllm/recipe.yaml` has the settings (`svdllm compress MODEL -o OUT --recipe svdllm/recipe.yaml` repeats a run whose
  text was named, not handed over in Python); `svdllm/report.json` has every layer's form, size, kept energy and loss.
"""


def _calibration(report: dict[str, Any]) -> str:
    source, recipe = report["source"], report["recipe"]
    if not source["calibration"]:
        return "none (the method needs no data)"
    return (
        f"{source['calibration']}, {source['calibration_tokens']:,} tokens in windows of {recipe['seqlen']}, "
        f"seed {recipe['seed']}, fingerprint `{source['calibration_fingerprint'][:16]}`"
    )


def _worst_linears(report: dict[str, Any]) -> str:
    changed = [row for row in report["linears"] if form_of(row) != "dense"]
    worst = sorted(changed, key=lambda row: row["kept_energy"])[:SHOWN_LINEARS]
    rows = "\n".join(
        f"| `{row['name']}` | {row['out_features']} x {row['in_features']} | {form_of(row)}, "
        f"{row.get('size', row['rank'])} | {row['kept_energy']:.4f} |"
        for row in worst
    )
    return f"""The layers that lost most (share of the output's energy kept over the calibration tokens):

| linear | shape | form, and its rank or width | kept energy |
|---|---|---|---|
{rows}
"""


def quantization_text(entry: dict[str, Any]) -> str:
    """Sums up a quantisation in one line: each scheme with its number of linears, and how many were left."""
    schemes = "; ".join(f"{scheme} ({number} linears)" for scheme, number in entry["by_scheme"].items())
    package = entry.get("format", "torchao")
    return f"{schemes}; {len(entry['left'])} left as they were; {package} {entry['versions'][package]}"


def recovery_text(entry: dict[str, Any]) -> str:
    """Sums up a recovery in one line: methods, tokens and data."""
    settings = entry["settings"]
    texts = sorted({examples["source"] for examples in entry["examples"].values()})
    return f"{', '.join(settings['methods'])} on {entry['tokens']:,} tokens of {', '.join(texts) or settings['data']}"
