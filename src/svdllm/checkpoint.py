"""The checkpoint, format version 1: written shard by shard, loaded, verified, exported to dense.

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
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from svdllm.analysis import Analysis
from svdllm.budget import SHARD_BYTES, Tensors, compressed_tensors, shard_names, stored_tensors, tensor_bytes
from svdllm.config import Recipe
from svdllm.errors import CheckpointError, InputError, NumericalError
from svdllm.linalg import factorise
from svdllm.modeling import FORMAT_VERSION, LowRankLinear, compare_hashes, family_classes, low_rank_config, write_hashes
from svdllm.plan import Plan, resolve_device
from svdllm.progress import Reporter
from svdllm.records import LinearRecord, Provenance
from svdllm.report.card import model_card
from svdllm.source import SafetensorsWeights, Source, Weights, build_skeleton, companion_files
from svdllm.stream import Walk
from svdllm.structure import Structure, Target, discover
from svdllm.version import __version__

REPORT_FILE = "svdllm/report.json"
RECIPE_FILE = "svdllm/recipe.yaml"
REFERENCE_FILE = "svdllm/reference.safetensors"
INDEX_FILE = "model.safetensors.index.json"
REFERENCE_TOKENS = 16
REFERENCE_POSITIONS = 4
# Logits of two processes, computed in float32 with different products, relative to the largest logit.
REFERENCE_TOLERANCE = 1e-3


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
    _write_shards(partial, factors, compressed_tensors(stored_tensors(source, skeleton), structure.targets, plan.ranks))
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
    report["seconds"] = dict(reporter.seconds)
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
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{REPORT_FILE} in {folder} is damaged: {error}") from error


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


def verify(folder: str | Path, device: str = "auto") -> list[tuple[str, str]]:
    """Checks hashes, shapes, finiteness and the stored reference logits of a checkpoint.

    Returns the checks that were made, as (name, what was found).

    Raises:
        CheckpointError: the first check that fails; names the file or tensor.
        NumericalError: a weight or logit is NaN or infinite.
    """
    folder = Path(folder)
    report = read_report(folder)
    if not (folder / "svdllm" / "hashes.json").is_file():
        raise CheckpointError(f"{folder} has no svdllm/hashes.json: nothing to verify its files against.")
    problems = compare_hashes(folder)
    if problems:
        raise CheckpointError(f"{folder} is not as it was written: {' '.join(problems)} Fetch or write it again.")
    checks = [("hashes", "every file is as it was written")]
    model = load_model(folder, dtype=torch.float32, check_integrity=False)
    ranks = {name: m.svd_v.out_features for name, m in model.named_modules() if isinstance(m, LowRankLinear)}
    wanted = {row["name"]: row["rank"] for row in report["linears"] if row["rank"] is not None}
    if ranks != wanted:
        different = sorted(name for name in {**ranks, **wanted} if ranks.get(name) != wanted.get(name))
        raise CheckpointError(f"{folder}: the ranks of {', '.join(different[:3])} are not those of {REPORT_FILE}.")
    if model.num_parameters() != report["params"]:
        raise CheckpointError(f"{folder}: {report['params']:,} parameters expected, {model.num_parameters():,} found.")
    checks.append(("shapes", f"{len(ranks)} low-rank linears, {report['params']:,} parameters"))
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NumericalError(f"{folder}: {name} has NaN or infinite values.")
    checks.append(("finite", "every weight"))
    checks.append(("logits", f"largest difference {_reference_difference(folder, model, device):.1e} of the largest logit"))
    return checks


def export_dense(folder: str | Path, output_dir: str | Path) -> None:
    """Multiplies the factors out: a plain model of the base family, loadable everywhere, as large as the original.

    Raises:
        InputError: ``folder`` is no checkpoint, or ``output_dir`` is not empty.
        CheckpointError: a file is truncated or altered.
    """
    folder, output_dir = Path(folder), Path(output_dir)
    read_report(folder)
    if output_dir.exists() and (output_dir.is_file() or any(output_dir.iterdir())):
        raise InputError(f"{output_dir} exists and is not empty; nothing is overwritten. Choose another path.")
    problems = compare_hashes(folder, weights_only=True) if (folder / "svdllm" / "hashes.json").is_file() else []
    if problems:
        raise CheckpointError(f"{folder} is not as it was written: {' '.join(problems)}")
    from svdllm.source import load_config

    config = load_config(folder, str(folder))
    base = dense_config(config)
    weights = SafetensorsWeights(folder, build_skeleton(config))
    dense = _Products(weights, build_skeleton(base), config.svdllm["ranks"])
    partial = output_dir.with_name(f"{output_dir.name}.writing")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_shards(partial, dense, dense.tensors)
    base.save_pretrained(partial)
    for path in companion_files(folder):
        (partial / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / path, partial / path)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    partial.replace(output_dir)


def dense_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The base family's config of a low-rank config."""
    from svdllm.modeling.factory import base_classes

    base = base_classes(config.svdllm["base_model_type"])  # type: ignore[attr-defined]
    fields = config.to_dict()
    for key in ("svdllm", "auto_map", "model_type", "architectures", "transformers_version"):
        fields.pop(key, None)
    return base.config(**fields, architectures=[base.causal_lm.__name__])


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
            spectrum = self._analysis.spectrum(target)
            u_OR, v_RI = factorise(
                weight_OI,
                spectrum.energies_K.to(self._device),
                spectrum.basis_OD.to(self._device),
                self._ranks[target.name],
            )
            self._made = (target.name, {"svd_u.weight": _as(u_OR, stored), "svd_v.weight": _as(v_RI, stored)})
            for leaf, factor in self._made[1].items():
                if not bool(torch.isfinite(factor).all()):
                    raise NumericalError(f"{target.name}.{leaf} overflows {stored.dtype}; leave it dense with --ignore.")
            self._reporter.advance(target.block + 1, self._num_blocks)
        return self._made[1]


class _Products:
    """The tensors of the dense model that a low-rank one multiplies out to."""

    def __init__(self, weights: SafetensorsWeights, skeleton: PreTrainedModel, ranks: dict[str, int]):
        self._weights, self._skeleton, self._ranks = weights, skeleton, ranks
        self.tensors: Tensors = {}
        for name in weights.names():
            shape, dtype = weights.shape_and_dtype(name)
            owner = name.rpartition(".")[0].removesuffix(".svd_u").removesuffix(".svd_v")
            if owner not in ranks:
                self.tensors[name] = (shape, dtype)
            elif name.endswith(".svd_u.weight"):
                shape = tuple(skeleton.get_parameter(f"{owner}.weight").shape)
                self.tensors[f"{owner}.weight"] = (shape, dtype)
            elif name.endswith(".svd_u.bias"):
                self.tensors[f"{owner}.bias"] = (shape, dtype)

    def get(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        if owner not in self._ranks:
            return self._weights.get(name)
        if leaf == "bias":
            return self._weights.get(f"{owner}.svd_u.bias")
        u_OR, v_RI = self._weights.get(f"{owner}.svd_u.weight"), self._weights.get(f"{owner}.svd_v.weight")
        product_OI = u_OR.double() @ v_RI.double()
        is_conv1d = isinstance(self._skeleton.get_submodule(owner), Conv1D)  # which keeps its weight as (in, out)
        return _as(product_OI.mT if is_conv1d else product_OI, u_OR)


def _write_shards(folder: Path, tensors: Any, layout: Tensors) -> None:
    """Safetensors files of at most ``SHARD_BYTES`` (but whole pairs of factors), and their index if there are several."""
    shards = shard_names(layout, SHARD_BYTES)
    index: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensors.get(name).cpu().contiguous() for name in names}, folder / file, metadata={"format": "pt"})
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
        source.model.generation_config.save_pretrained(folder)
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
    save_file({"token_ids": ids, "logits": logits}, folder / REFERENCE_FILE)


def _reference_difference(folder: Path, model: PreTrainedModel, device: str) -> float:
    reference = load_file(folder / REFERENCE_FILE)
    place = resolve_device(device)
    model.to(place)  # type: ignore[arg-type]
    with torch.no_grad():
        logits = model.eval()(input_ids=reference["token_ids"].to(place)).logits[:, -REFERENCE_POSITIONS:].float().cpu()
    if not bool(torch.isfinite(logits).all()):
        raise NumericalError(f"{folder}: the logits are not finite.")
    difference = float((logits - reference["logits"]).abs().max() / reference["logits"].abs().max())
    if difference > REFERENCE_TOLERANCE:
        raise CheckpointError(
            f"{folder}: the logits differ from the stored reference by {difference:.1e} of the largest logit "
            f"(at most {REFERENCE_TOLERANCE:.0e} expected): the model does not compute what was written."
        )
    return difference


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to("cpu", like.dtype).contiguous()
