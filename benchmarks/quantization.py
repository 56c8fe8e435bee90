"""Perplexity at equal bytes: low rank alone, quantised low rank, quantisation alone (as in the paper's Table 8).

Every checkpoint given is measured as it is, in 8 bits and in 4 bits, and so is the dense model. Bytes are those of the
weight files; a second column counts what they would be if every tensor that is not quantised were stored in 16 bits. At
every budget of bytes the best model that fits is marked.

    python benchmarks/quantization.py DENSE CHECKPOINT... --text FILE... -o RESULTS
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from svdllm.checkpoint.weight_sizes import weight_bytes
from svdllm.common.progress import Reporter
from svdllm.evaluation.side_by_side import evaluate_models
from svdllm.export.quantize import quantize
from svdllm.models.open import open_config

FORMS = (None, 8, 4)


def forms_of(folder: Path, work: Path) -> Iterator[tuple[int | None, Path, dict[str, int]]]:
    """The model as it is, and quantised: bits, folder, and how many linears have which scheme."""
    for bits in FORMS:
        if bits is None:
            yield bits, folder, {}
            continue
        with tempfile.TemporaryDirectory(dir=work) as place:
            result = quantize(folder, Path(place) / folder.name, bits=bits, format="torchao")
            yield bits, result.output_dir, result.by_scheme()


def measure(folder: Path, is_dense: bool, texts: list[str], seqlen: int, windows: int, work: Path) -> Iterator[dict]:
    for bits, place, schemes in forms_of(folder, work):
        (measured,) = evaluate_models(
            [str(place)], texts, seqlen=seqlen, max_windows=windows, offline=True, reporter=Reporter()
        )
        count = weight_bytes(place)
        yield {
            "model": folder.name,
            "kind": f"{'dense' if is_dense else 'low rank'}{'' if bits is None else f', {bits} bits'}",
            "bits": bits,
            "schemes": schemes,
            "params": measured.params,
            "file_bytes": count.files,
            "file_bytes_at_16_bits": count.files_at_16_bits,
            "quantized_bytes": count.quantized,
            "perplexity": {
                Path(text).name: found.to_dict() | {"source": Path(text).name}
                for text, found in measured.perplexity.items()
            },
        }


def front(rows: list[dict[str, Any]], text: str, size: str) -> list[dict[str, Any]]:
    """The rows that no smaller one is better than, from the smallest: the best model of every budget."""
    best, chosen = float("inf"), []
    for row in sorted(rows, key=lambda row: row[size]):
        if row["perplexity"][text]["perplexity"] < best:
            best = row["perplexity"][text]["perplexity"]
            chosen.append(row)
    return chosen


def markdown(document: dict[str, Any]) -> str:
    rows, texts = document["rows"], document["texts"]
    titles = [Path(text).stem for text in texts]
    best = [{id(row) for row in front(rows, text, "file_bytes_at_16_bits")} for text in texts]
    lines = [
        f"| model | kind | MB | MB at 16 bits | {' | '.join(titles)} |",
        f"|---|---|---:|---:|{'---:|' * len(texts)}",
    ]
    for row in sorted(rows, key=lambda row: row["file_bytes_at_16_bits"]):
        cells = []
        for text, marked in zip(texts, best, strict=True):
            found = row["perplexity"][text]
            value = f"{found['perplexity']:.2f} ± {found['stderr']:.2f}"
            cells.append(f"**{value}**" if id(row) in marked else value)
        sizes = f"{row['file_bytes'] / 1e6:.1f} | {row['file_bytes_at_16_bits'] / 1e6:.1f}"
        lines.append(f"| {row['model']} | {row['kind']} | {sizes} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="*")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("-o", "--output", type=Path, required=True, help="two files: this name with .json and .md")
    arguments = parser.parse_args()
    document: dict[str, Any] = {
        "dense": arguments.dense.name,
        "dtype": str(open_config(arguments.dense).dtype).removeprefix("torch."),
        "texts": [Path(text).name for text in arguments.text],
        "seqlen": arguments.seqlen,
        "windows": arguments.windows,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as work:
        for folder in (arguments.dense, *arguments.checkpoints):
            dense = folder == arguments.dense
            for row in measure(folder, dense, arguments.text, arguments.seqlen, arguments.windows, Path(work)):
                document["rows"].append(row)
                arguments.output.with_suffix(".json").write_text(json.dumps(document, indent=2) + "\n")
                arguments.output.with_suffix(".md").write_text(markdown(document))
                print(row["model"], row["kind"], row["file_bytes"], flush=True)
    print(markdown(document))


if __name__ == "__main__":
    main()
