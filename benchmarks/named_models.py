"""The page of named models: what svdllm reaches of each, by its published shapes, on the meta device.

Nothing is downloaded: shapes are in ``published_models``. A model is planned as ``svdllm plan`` plans a folder that
holds its config alone.

    python benchmarks/named_models.py --page docs/models.md     # all, in a few minutes
    python benchmarks/named_models.py gemma-3 deepseek          # some, printed
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig, logging

from gpu_page import table
from published_models import PUBLISHED, WRAPPERS, Published
from svdllm.checkpoint.tensors import buffer_names, loaded_tensors, num_params
from svdllm.common.errors import SvdllmError, first_line
from svdllm.compression.recipe import Recipe
from svdllm.compression.subject import Subject, discover_subject
from svdllm.models.low_rank.families import find_head
from svdllm.models.open import open_config

ENOUGH = 0.8  # of the blocks' weights
KINDS = ("dense", "mixture", "hybrid", "wrapper", "quantised")
INTRODUCTION = f"""# Named models

What `svdllm compress` reaches of {len(PUBLISHED)} models of 2023 to 2026. Each is planned by its published shapes
alone, without its weights. *Reached* is the share of the parameters in its blocks that are weights of linears that can
be compressed, experts included; the rest of the blocks stays as it is, and so do embeddings, the head and towers for
images. A model of which less than half is reached needs `--allow-partial`.

[benchmarks/named_models.py](../benchmarks/named_models.py) makes this page: `make models-page`.
"""


@dataclass(frozen=True, kw_only=True)
class Reached:
    """What is reached of a model; ``refused`` is why nothing is."""

    name: str
    type: str
    kinds: list[str]
    params: int = 0
    share: float = 0.0
    refused: str = ""

    @property
    def row(self) -> list[str]:
        reached = "refused" if self.refused else f"{self.share:.0%}"
        size = f"{self.params / 1e9:.1f} B" if self.params else ""
        return [self.name, f"`{self.type}`", ", ".join(self.kinds), size, reached]


def published_config(model: Published) -> PretrainedConfig:
    """The config of a published model, as far as its shapes go."""
    head = find_head(model.type)
    assert head is not None
    config = CONFIG_MAPPING[model.type](**model.fields)
    config.architectures = [head.cls.__name__]
    config.dtype = "bfloat16"
    if model.quantization is not None:
        config.quantization_config = model.quantization
    return config


def reached(name: str, model: Published) -> Reached:
    """Plans a model up to its blocks and the linears in them."""
    kinds = ["wrapper"] * (name in WRAPPERS) + ["hybrid"] * model.hybrid
    quantised = ["quantised"] * (model.quantization is not None)
    with tempfile.TemporaryDirectory() as folder:
        published_config(model).save_pretrained(folder)
        try:
            source = open_config(folder, offline=True, require_weights=False)
            subject = discover_subject(source, Recipe(ratio=0.3, allow_partial=True))
        except SvdllmError as error:
            line = first_line(error).replace(folder, name).replace(Path(folder).name, name)
            return Reached(name=name, type=model.type, kinds=[*kinds, *quantised], refused=line)
    structure = subject.structure
    kinds += ["mixture"] * bool(structure.pools)
    return Reached(
        name=name,
        type=model.type,
        kinds=[*(kinds or ["dense"]), *quantised],
        params=_num_params(subject),
        share=structure.compressible_share,
    )


def _num_params(subject: Subject) -> int:
    skeleton = subject.skeleton
    return num_params(loaded_tensors(skeleton, torch.bfloat16), buffer_names(skeleton))


def summary(rows: Sequence[Reached]) -> list[str]:
    """How many models of each kind are accepted, and how many are reached for the most part."""
    lines = []
    for kind in KINDS:
        own = [row for row in rows if kind in row.kinds]
        accepted = [row for row in own if not row.refused]
        most = sum(row.share >= ENOUGH for row in accepted)
        least = f"{min(row.share for row in accepted):.0%}" if accepted else ""
        lines.append([kind, len(own), len(accepted), most, least])
    return table(["kind", "models", "accepted", f"{ENOUGH:.0%} or more reached", "least reached"], lines)


def page(rows: Sequence[Reached]) -> str:
    refused = [f"- {row.name}: {row.refused}" for row in rows if row.refused]
    parts = [
        INTRODUCTION,
        *summary(rows),
        "",
        *table(["model", "type", "kind", "parameters", "reached"], [row.row for row in rows]),
        *(["", "## Refused", "", *refused] if refused else []),
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names; all models by default")
    parser.add_argument("--page", type=Path, help="writes the page to this file")
    parser.add_argument("--record", type=Path, help="keeps rows in this JSON file, and goes on from there")
    options = parser.parse_args()
    logging.set_verbosity_error()
    known: dict[str, dict[str, object]] = {}
    if options.record is not None and options.record.is_file():
        known = json.loads(options.record.read_text())
    rows = []
    for name, model in PUBLISHED.items():
        if options.names and not any(part.lower() in name.lower() for part in options.names):
            continue
        row = Reached(**known[name]) if name in known else reached(name, model)  # type: ignore[arg-type]
        rows.append(row)
        print(" | ".join(row.row), row.refused, flush=True)
        if options.record is not None:
            known[name] = asdict(row)
            options.record.write_text(json.dumps(known, indent=1))
    if options.page is not None:
        options.page.write_text(page(rows), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
