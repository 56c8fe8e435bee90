"""The model card of a checkpoint."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


def model_card(report: dict[str, Any], config: PreTrainedConfig) -> str:
    """Markdown for the hub: what the model is, how it was made and how to load it. Holds no times, so that two runs
    of one recipe write the same card."""
    source, recipe = report["source"], report["recipe"]
    dense = sum(row["rank"] is None for row in report["linears"])
    factorised = [row for row in report["linears"] if row["rank"] is not None]
    removed = 1 - report["params"] / report["dense_params"]
    calibration = "none (the method needs no data)"
    if source["calibration"]:
        calibration = (
            f"{source['calibration']}, {source['calibration_tokens']:,} tokens in windows of {recipe['seqlen']}, "
            f"seed {recipe['seed']}, fingerprint `{source['calibration_fingerprint'][:16]}`"
        )
    smaller = ""
    if recipe.get("elastic"):
        smaller = f"""
## Smaller sizes

This checkpoint is elastic: any ratio R from {recipe["ratio"]} can be made of it in seconds, without the original model or
calibration text, by `svdllm slice FOLDER --ratio R -o SMALLER`, or loaded by `svdllm.load_model("FOLDER", ratio=R)`.
The files `svdllm/elastic*` are for this only.
"""
    trained = "It was not trained after compression."
    if history := report.get("recovery"):
        trained = "After compression it was trained: " + "; ".join(map(recovery_text, history)) + "."
    quantized, plain = "", " A plain\nmodel of the original architecture and size: `svdllm export FOLDER -o DENSE`."
    if entry := report.get("quantization"):
        quantized = f"""
## In few bits

Its linears are stored as {quantization_text(entry)}. Loading them needs the package torchao, on a CPU or a
GPU. Before that the weight files had {entry["unquantized_file_bytes"] / 1e6:,.1f} MB.
"""
        plain = ""
    elif later := report.get("quantized_file_bytes"):
        quantized = f"""
## In few bits

Its ranks were chosen for {recipe["factor_bits"]} bits: `svdllm quantize FOLDER -o SMALLER --bits {recipe["factor_bits"]}` makes weight files of
{later / 1e6:,.1f} MB of it, of the {recipe["target_size"] / 1e6:,.1f} MB that they may have.
"""
    streams = "compressed" if recipe["calibration_mode"] == "sequential" else "dense"
    worst = sorted(factorised, key=lambda row: row["kept_energy"])[:5]
    worst_rows = "\n".join(
        f"| `{row['name']}` | {row['out_features']} x {row['in_features']} | {row['rank']} | {row['kept_energy']:.4f} |"
        for row in worst
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [svdllm, low-rank, compression]
---

# {source["model"]}, compressed by {report["achieved_ratio"]:.0%}

{source["model"]} with {len(factorised)} of its linear layers replaced by low-rank pairs
(`svd_u @ svd_v`, method `{report["method"]}`, [SVD-LLM](https://arxiv.org/abs/2403.07378)); {dense} stay dense.

| | dense | this model |
|---|---|---|
| parameters | {report["dense_params"]:,} | {report["params"]:,} ({removed:.1%} fewer) |
| weight files | {report["dense_file_bytes"] / 1e6:,.1f} MB | {report["file_bytes"] / 1e6:,.1f} MB |
| parameters of the linears removed | | {report["achieved_ratio"]:.2%} |

{trained} Measure its quality on your own text before you use it:
`svdllm eval FOLDER --base ORIGINAL --ppl your-text.txt`.

## Load

```python
import svdllm  # registers the model type {config.model_type}
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

Without svdllm installed, pass `trust_remote_code=True`: the code files in this folder are self-contained.{plain}
{quantized}{smaller}
## How it was made

- Source: {source["model"]}{f", revision {source['revision']}" if source["revision"] else ""}, weights `{source["weights_fingerprint"][:16]}`
- Calibration: {calibration}
- Metric: {recipe["metric"]}; ranks: {report["allocation"]["name"]}; inputs of the {streams} model
- Versions: svdllm {report["versions"]["svdllm"]}, torch {report["versions"]["torch"]}, transformers {report["versions"]["transformers"]}
- `svdllm/recipe.yaml` has the settings (`svdllm compress MODEL -o OUT --recipe svdllm/recipe.yaml` repeats a run whose
  text was named, not handed over in Python); `svdllm/report.json` has every layer's rank, kept energy and loss.

The layers that lost most (share of the output's energy kept over the calibration tokens):

| linear | shape | rank | kept energy |
|---|---|---|---|
{worst_rows}
"""


def quantization_text(entry: dict[str, Any]) -> str:
    """One line on a quantisation: schemes with the number of linears, and what was left."""
    schemes = "; ".join(f"{scheme} ({number} linears)" for scheme, number in entry["by_scheme"].items())
    return f"{schemes}; {len(entry['left'])} left as they were; torchao {entry['versions']['torchao']}"


def recovery_text(entry: dict[str, Any]) -> str:
    """One line on a recovery: methods, tokens and data."""
    settings = entry["settings"]
    texts = sorted({examples["source"] for examples in entry["examples"].values()})
    return f"{', '.join(settings['methods'])} on {entry['tokens']:,} tokens of {', '.join(texts) or settings['data']}"
