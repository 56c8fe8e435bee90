"""Completes a checkpoint (format version 1).

A low-rank model is an architecture of its own (``svdllm_<family>``), so its folder is a normal one of transformers:
config, code files, safetensors in the source's dtype, tokenizer. ``svdllm/`` in it has the recipe, the report, the
hashes and the reference logits.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from svdllm.checkpoint.card import model_card
from svdllm.checkpoint.reference import write_reference
from svdllm.checkpoint.report import REPORT_FILE
from svdllm.common.progress import Reporter
from svdllm.models.config_files import load_config
from svdllm.models.low_rank import HASHES_FILE, write_hashes
from svdllm.models.safetensors_files import weight_files

RECIPE_FILE = "svdllm/recipe.yaml"


def finish_checkpoint(
    partial: Path,
    recipe_yaml: str,
    report: dict[str, Any],
    device: torch.device,
    reporter: Reporter,
    scratch: Path | None = None,
) -> None:
    """Writes recipe, card, reference logits, report and hashes into a folder that has config, code and weights.

    Args:
        scratch: see ``reference_logits``.
    """
    config = load_config(partial, partial.name, allow_quantized=True)
    (partial / RECIPE_FILE).write_text(recipe_yaml, encoding="utf-8")
    (partial / "README.md").write_text(model_card(report, config), encoding="utf-8")
    write_reference(partial, config, device, scratch)
    report["seconds"] = {name: taken for name, taken in reporter.seconds.items() if name != "write"}
    (partial / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_hashes(partial)


def copy_companions(folder: Path, partial: Path) -> None:
    """Copies the hashed files other than weights and config (code, tokenizer) to a checkpoint made of this one."""
    hashed = json.loads((folder / HASHES_FILE).read_text(encoding="utf-8"))["files"]
    written_anew = {"config.json", *(path.name for path in weight_files(folder))}
    for name in hashed:
        if name not in written_anew and not name.endswith(".index.json") and not name.startswith("svdllm/"):
            (partial / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, partial / name)
