"""The checkpoint, format version 1: written shard by shard, and loaded.

A low-rank model is an architecture of its own (``svdllm_<family>``), so the folder is an ordinary one: config, code
files, safetensors in the source's dtype, tokenizer. ``svdllm/`` in it has the recipe, the report, the hashes and the
reference logits.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from svdllm.analysis import Analysis
from svdllm.budget import SHARD_BYTES, Tensors, compressed_tensors, shard_names, stored_tensors, tensor_bytes
from svdllm.config import Recipe
from svdllm.errors import CheckpointError, InputError, NumericalError
from svdllm.linalg import factorise
from svdllm.modeling import FORMAT_VERSION, family_classes, low_rank_config, write_hashes
from svdllm.plan import Plan, resolve_device
from svdllm.progress import Reporter
from svdllm.records import LinearRecord, Provenance
from svdllm.report.card import model_card
from svdllm.source import Source, build_skeleton, companion_files
from svdllm.stream import Walk
from svdllm.structure import Structure, Target, discover
from svdllm.version import __version__
from svdllm.weights import SafetensorsWeights, Weights, save_tensors

REPORT_FILE = "svdllm/report.json"
RECIPE_FILE = "svdllm/recipe.yaml"
REFERENCE_FILE = "svdllm/reference.safetensors"
INDEX_FILE = "model.safetensors.index.json"
REFERENCE_TOKENS = 16
REFERENCE_POSITIONS = 4


def write_checkpoint(
    folder: Path,
    *,
    source: Source,
    skeleton: PreTrainedModel,
    structure: Structure,
    plan: Plan,
    recipe: Recipe,
    analysis: Analysis,
    provenance: Provenance,
    linears: list[LinearRecord],
    tokenizer: Any = None,
    reporter: Reporter | None = None,
) -> None:
    """Writes a complete checkpoint; ``folder`` appears under its name when everything is in it."""
    assert source.weights is not None
    reporter = reporter or Reporter()
    partial = folder.with_name(f"{folder.name}.writing")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "svdllm").mkdir(parents=True)
    factors = _Factors(source.weights, structure, plan.ranks, analysis, resolve_device(recipe.device), reporter)
    write_shards(partial, factors, compressed_tensors(stored_tensors(source, skeleton), structure.targets, plan.ranks))
    config = low_rank_config(source.config, _config_entry(source, plan, provenance))
    config.dtype = plan.dtype
    config.save_pretrained(partial)
    for name, text in family_classes(source.config.model_type).causal_lm.code_files().items():
        (partial / name).write_text(text, encoding="utf-8", newline="\n")
    _copy_companions(partial, source, tokenizer)
    (partial / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    report = report_of(plan, recipe, provenance, linears)
    (partial / "README.md").write_text(model_card(report, config), encoding="utf-8")
    _write_reference(partial, config, resolve_device(recipe.device))
    report["seconds"] = {name: taken for name, taken in reporter.seconds.items() if name != "write"}
    (partial / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_hashes(partial)
    partial.replace(folder)


def report_of(plan: Plan, recipe: Recipe, provenance: Provenance, linears: list[LinearRecord]) -> dict[str, Any]:
    """The content of ``svdllm/report.json``, without the times of the run."""
    import transformers

    return {
        "format_version": FORMAT_VERSION,
        "source": provenance.to_dict(),
        "method": plan.method,
        "recipe": recipe.to_dict(),
        "ratio": plan.achieved_ratio,
        "params": plan.params,
        "dense_params": plan.dense_params,
        "file_bytes": plan.file_bytes,
        "dense_file_bytes": plan.dense_file_bytes,
        "versions": {"svdllm": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "warnings": plan.warnings,
        "linears": [asdict(record) for record in linears],
    }


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a checkpoint.

    Raises:
        InputError: the folder is not a checkpoint of this library.
    """
    file = Path(folder) / REPORT_FILE
    if not file.is_file():
        raise InputError(f"{folder} is no svdllm checkpoint: it has no {REPORT_FILE}. Make one with `svdllm compress`.")
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{REPORT_FILE} in {folder} is damaged: {error}") from error
    if not isinstance(report, dict) or not {"linears", "source", "recipe", "params"} <= set(report):
        raise CheckpointError(f"{REPORT_FILE} in {folder} is damaged: entries are missing.")
    return report


def is_checkpoint(folder: str | Path) -> bool:
    return (Path(folder) / REPORT_FILE).is_file()


def load_model(model: str | Path, **kwargs: Any) -> PreTrainedModel:
    """A model by ``from_pretrained``, compressed or not, with this library's errors.

    Raises:
        CheckpointError: a file is missing, truncated or altered; names it.
        InputError: no such model.
    """
    path = Path(model)
    if path.is_file() and path.suffix.lower() == ".gguf":
        kwargs["gguf_file"] = path.name
        path = path.parent
    try:
        return AutoModelForCausalLM.from_pretrained(str(path) if path.exists() else str(model), **kwargs)
    except SafetensorError as error:
        raise CheckpointError(f"The weights of {model} are truncated or damaged: {error}.") from error
    except (ValueError, OSError) as error:
        kind = CheckpointError if path.is_dir() else InputError
        raise kind(f"{model} cannot be loaded: {error}") from error


class _Factors:
    """The tensors of a compressed model, made one target at a time from source weights and stored bases."""

    def __init__(
        self,
        weights: Weights,
        structure: Structure,
        ranks: dict[str, int],
        analysis: Analysis,
        device: torch.device,
        reporter: Reporter,
    ):
        self._weights, self._ranks, self._analysis, self._device = weights, ranks, analysis, device
        self._targets = {target.name: target for target in structure.targets}
        self._made: tuple[str, dict[str, Tensor]] = ("", {})
        self._reporter, self._num_blocks = reporter, len(structure.blocks)

    def get(self, name: str) -> Tensor:
        for leaf in ("svd_v.weight", "svd_u.weight"):
            if name.endswith(leaf):
                return self._factors_of(self._targets[name.removesuffix(f".{leaf}")])[leaf]
        source_name = name.replace(".svd_u.bias", ".bias")
        return self._weights.get(source_name)

    def _factors_of(self, target: Target) -> dict[str, Tensor]:
        if self._made[0] != target.name:
            stored = self._weights.get(f"{target.name}.weight")
            weight_OI = (stored.mT if target.is_conv1d else stored).to(self._device)
            spectrum = self._analysis.spectrum(target).to(self._device)
            u_OR, v_RI = factorise(weight_OI, spectrum, self._ranks[target.name])
            self._made = (target.name, {"svd_u.weight": _as(u_OR, stored), "svd_v.weight": _as(v_RI, stored)})
            for leaf, factor in self._made[1].items():
                if not bool(torch.isfinite(factor).all()):
                    raise NumericalError(
                        f"{target.name}.{leaf} overflows {stored.dtype}; leave it dense with --ignore."
                    )
            self._reporter.advance(target.block + 1, self._num_blocks)
        return self._made[1]


def write_shards(folder: Path, tensors: Any, layout: Tensors) -> None:
    """Safetensors files of at most ``SHARD_BYTES`` (but whole pairs of factors), and their index if there are several."""
    shards = shard_names(layout, SHARD_BYTES)
    index: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_tensors({name: tensors.get(name).cpu().contiguous() for name in names}, folder / file)
        index.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        content = {"metadata": {"total_size": tensor_bytes(layout)}, "weight_map": dict(sorted(index.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _config_entry(source: Source, plan: Plan, provenance: Provenance) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "base_model_type": source.config.model_type,
        "ranks": plan.ranks,
        "library_version": __version__,
        "source": {"id": source.name, "revision": source.revision, "fingerprint": provenance.weights_fingerprint},
    }


def _copy_companions(folder: Path, source: Source, tokenizer: Any) -> None:
    if source.folder is not None:
        for path in companion_files(source.folder):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.folder / path, folder / path)
    elif source.model is not None and source.model.generation_config is not None:
        # As it is: save_pretrained refuses settings that generate only warns about.
        (folder / "generation_config.json").write_text(
            source.model.generation_config.to_json_string(), encoding="utf-8"
        )
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _write_reference(folder: Path, config: PreTrainedConfig, device: torch.device) -> None:
    """Logits of a few fixed tokens, computed from the written files with one block resident."""
    ids = (torch.arange(REFERENCE_TOKENS).unsqueeze(0) * 7919 + 11) % config.get_text_config().vocab_size
    skeleton = build_skeleton(config)
    weights = SafetensorsWeights(folder, skeleton)
    walk = Walk(
        weights=weights, skeleton=skeleton, structure=discover(skeleton), ids=ids, device=device, dtype=torch.float32
    )
    for block in walk.blocks():
        block.run()
    logits = walk.logits()[:, -REFERENCE_POSITIONS:].contiguous()
    if not bool(torch.isfinite(logits).all()):
        raise NumericalError("The compressed model's logits are not finite.")
    save_tensors({"token_ids": ids, "logits": logits}, folder / REFERENCE_FILE)


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to("cpu", like.dtype).contiguous()
