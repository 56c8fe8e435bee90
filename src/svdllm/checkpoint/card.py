"""The model card of a checkpoint: its README.md, in Markdown for the hub."""

from __future__ import annotations

from collections import Counter
from typing import Any

from transformers import PreTrainedConfig

from svdllm.checkpoint.report import form_of

SHOWN_LINEARS = 5  # those that lost most
FORMS = {
    "pair": "as pairs of factors (`svd_u @ svd_v`)",
    "packed": "packed (pivot rows or columns, and how the others are made of them)",
    "narrow": "narrower (fewer heads, or fewer inner features of an MLP)",
    "dropped": "removed with the attention or MLP that they belong to",
}


def model_card(report: dict[str, Any], config: PreTrainedConfig) -> str:
    """Describes what a model is, how it was made and how to load it.

    It holds no times, so that two runs of one recipe write the same card.
    """
    made = (_pruning(report),) if "pruning" in report else (_making(report), _worst_linears(report))
    sections = (
        _overview(report),
        _loading(report, config),
        _quantization(report),
        _smaller_sizes(report),
        *made,
    )
    return "\n".join(section for section in sections if section)


def _overview(report: dict[str, Any]) -> str:
    counts = Counter(map(form_of, report["linears"]))
    forms = "; ".join(f"{counts[form]} {text}" for form, text in FORMS.items() if counts[form])
    removed = 1 - report["params"] / report["dense_params"]
    trained = "It was not trained after compression."
    if history := report.get("recovery"):
        trained = "After compression it was trained: " + "; ".join(map(recovery_text, history)) + "."
    model = report["source"]["model"]
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [svdllm, low-rank, compression]
---

# {model}, compressed by {report["achieved_ratio"]:.0%}

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


def _loading(report: dict[str, Any], config: PreTrainedConfig) -> str:
    to_dense = (
        ""
        if report.get("quantization")
        else (" A plain\nmodel of the original architecture and size: `svdllm export FOLDER -o DENSE`.")
    )
    return f"""## Load

```python
import svdllm  # registers the model type {config.model_type}
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

Without svdllm installed, pass `trust_remote_code=True`: the code files in this folder are self-contained.{to_dense}
"""


def _quantization(report: dict[str, Any]) -> str:
    if entry := report.get("quantization"):
        return f"""## Quantised

Its linears are stored as {quantization_text(entry)}. Loading them needs the package torchao, on a CPU or a
GPU. Before that the weight files had {entry["unquantized_file_bytes"] / 1e6:,.1f} MB.
"""
    if later := report.get("quantized_file_bytes"):
        bits, target = report["recipe"]["factor_bits"], report["recipe"]["target_size"]
        return f"""## Quantise

Its ranks were chosen for {bits} bits: `svdllm quantize FOLDER -o SMALLER --bits {bits}` makes weight files of
{later / 1e6:,.1f} MB of it, of the {target / 1e6:,.1f} MB that they may have.
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
    return f"{source['model']}{revision}, weights `{source['weights_fingerprint'][:16]}`"


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
    return f"{schemes}; {len(entry['left'])} left as they were; torchao {entry['versions']['torchao']}"


def recovery_text(entry: dict[str, Any]) -> str:
    """Sums up a recovery in one line: methods, tokens and data."""
    settings = entry["settings"]
    texts = sorted({examples["source"] for examples in entry["examples"].values()})
    return f"{', '.join(settings['methods'])} on {entry['tokens']:,} tokens of {', '.join(texts) or settings['data']}"
