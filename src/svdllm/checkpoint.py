"""The checkpoint, format version 1: written shard by shard, and loaded.

A low-rank model is an architecture of its own (``svdllm_<family>``), so the folder is an ordinary one: config, code
files, safetensors in the source's dtype, tokenizer. ``svdllm/`` in it has the recipe, the report, the hashes and the
reference logits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from svdllm.analysis import Analysis, FinalFactors
from svdllm.budget import spare_ranks
from svdllm.companions import GENERATION_CONFIG, copy_companion_files
from svdllm.config import Recipe
from svdllm.elastic import ELASTIC_STEM, ElasticIndex
from svdllm.errors import CheckpointError, InputError, NumericalError
from svdllm.layout import (
    SHARD_BYTES,
    Tensors,
    compressed_tensors,
    elastic_tensors,
    shard_names,
    stored_tensors,
    tensor_bytes,
)
from svdllm.linalg import corrected_bias, factorise
from svdllm.model_names import display_name
from svdllm.modeling import FORMAT_VERSION, HASHES_FILE, family_classes, low_rank_config, write_hashes
from svdllm.modeling.lowrank import sha256_of, unpacking_one_by_one
from svdllm.plan import Plan, resolve_device
from svdllm.progress import Reporter
from svdllm.records import LinearRecord, Provenance
from svdllm.report.card import model_card
from svdllm.source import Source, build_skeleton, hub_folder, load_config, open_config
from svdllm.stream import Walk
from svdllm.structure import Structure, Target, discover, linear_ranks, shared_factors
from svdllm.unused_tensors import warn_of_unused
from svdllm.version import __version__
from svdllm.weights import SafetensorsWeights, Weights, read_header, save_tensors, unused_in, weight_files

REPORT_FILE = "svdllm/report.json"
RECIPE_FILE = "svdllm/recipe.yaml"
REFERENCE_FILE = "svdllm/reference.safetensors"
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
    finals: FinalFactors | None = None,
    tokenizer: Any = None,
    reporter: Reporter | None = None,
) -> None:
    """Writes a complete checkpoint; ``folder`` appears under its name when everything is in it.

    Factors are slices of the bases in ``analysis``, unless ``finals`` has them.
    """
    assert source.weights is not None
    reporter = reporter or Reporter()
    partial = folder.with_name(f"{folder.name}.writing")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "svdllm").mkdir(parents=True)
    device, stored = resolve_device(recipe.device), stored_tensors(source, skeleton)
    factors = _Factors(source.weights, structure, plan.ranks, analysis, finals, device, reporter)
    write_shards(partial, factors, compressed_tensors(stored, structure.targets, plan.ranks))
    config = low_rank_config(source.config, _config_entry(source, structure, plan, recipe, provenance))
    config.dtype = plan.dtype
    config.save_pretrained(partial)
    for name, text in family_classes(source.config.model_type).causal_lm.code_files().items():
        (partial / name).write_text(text, encoding="utf-8", newline="\n")
    _copy_companions(partial, source, tokenizer)
    if recipe.elastic:
        spare = spare_ranks(recipe, structure, plan.ranks)
        factors = _Factors(source.weights, structure, spare, analysis, None, device, reporter)
        _write_elastic(partial, factors, stored, elastic_tensors(structure, stored, spare), analysis, recipe.allocation)
    report = report_of(plan, recipe, provenance, linears)
    if finals is not None:
        report["betas"] = finals.betas()
    finish_checkpoint(partial, recipe, report, device, reporter)
    partial.replace(folder)


def finish_checkpoint(
    partial: Path, recipe: Recipe, report: dict[str, Any], device: torch.device, reporter: Reporter
) -> None:
    """Everything that follows from what is in the folder already: recipe, card, reference logits, report, hashes."""
    config = load_config(partial, partial.name, allow_quantized=True)
    (partial / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    (partial / "README.md").write_text(model_card(report, config), encoding="utf-8")
    _write_reference(partial, config, device)
    report["seconds"] = {name: taken for name, taken in reporter.seconds.items() if name != "write"}
    (partial / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_hashes(partial)


def report_of(plan: Plan, recipe: Recipe, provenance: Provenance, linears: list[LinearRecord]) -> dict[str, Any]:
    """The content of ``svdllm/report.json``, without the times of the run."""
    import transformers

    return {
        "format_version": FORMAT_VERSION,
        "source": provenance.to_dict(),
        "method": plan.method,
        "recipe": recipe.to_dict(),
        "allocation": {
            "name": plan.allocation,
            "predicted_loss": plan.predicted_loss,
            "gap": plan.allocation_gap,
            "threshold": plan.allocation_threshold,
        },
        "speed": None if plan.speed is None else asdict(plan.speed),
        "linear_times": None if plan.linear_times is None else asdict(plan.linear_times),
        "ratio": plan.achieved_ratio,
        "params": plan.params,
        "dense_params": plan.dense_params,
        "file_bytes": plan.file_bytes,
        "dense_file_bytes": plan.dense_file_bytes,
        "elastic_bytes": plan.elastic_bytes,
        "quantized_file_bytes": plan.quantized_file_bytes,
        "versions": {"svdllm": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "warnings": plan.warnings,
        "unused_tensors": None if plan.unused_tensors is None else asdict(plan.unused_tensors),
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


def ranks_of(report: Mapping[str, Any]) -> dict[str, int]:
    """The rank of every factorised linear, by the report of a checkpoint."""
    rows = [row for row in report["linears"] if row["rank"] is not None]
    return {name: row["rank"] for row in rows for name in row.get("parts") or [row["name"]]}


def is_checkpoint(folder: str | Path) -> bool:
    return (Path(folder) / REPORT_FILE).is_file()


def load_model(model: str | Path, *, ratio: float | None = None, **kwargs: Any) -> PreTrainedModel:
    """A model by ``from_pretrained``, compressed or not, with this library's errors.

    Args:
        model: a folder, a hub id, or a GGUF file.
        ratio: of an elastic checkpoint, the size to load it at: the model that ``slice_checkpoint`` writes, without
            writing it. At least the ratio of the checkpoint.
        kwargs: for ``from_pretrained``. Only safetensors are read, and code that comes with a model is not run.

    Warns of tensors in the files that are not used (``UnusedTensorsWarning``).

    Raises:
        CheckpointError: a file is missing, truncated or altered; names it.
        InputError: no such model, or it has no such size.
        UnsupportedModelError: it is not a causal language model.
    """
    if ratio is not None:
        from svdllm.slicing import load_slice

        return load_slice(model, ratio, **kwargs)
    want_info = kwargs.pop("output_loading_info", False)
    place = _place_of(model, kwargs)
    try:
        with unpacking_one_by_one():
            settings = {"trust_remote_code": False, "use_safetensors": True, "ignore_mismatched_sizes": True} | kwargs
            both: Any = AutoModelForCausalLM.from_pretrained(str(place), output_loading_info=True, **settings)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any kind, by the class of the model and what is wrong in its files
        raise CheckpointError(f"{model} cannot be loaded: {type(error).__name__}: {error}") from error
    loaded, info = both
    _require_loaded(model, loaded, info)
    if "gguf_file" not in kwargs and getattr(loaded, "hf_quantizer", None) is None:
        warn_of_unused(display_name(model), unused_in(place, loaded))
    dtype = kwargs.get("dtype")
    if isinstance(dtype, torch.dtype) and is_torchao(loaded):
        loaded.to(dtype)  # a weight of 4 bits unpacks to the dtype that it was stored with
    return both if want_info else loaded


def _require_loaded(model: str | Path, loaded: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Raises CheckpointError where transformers has put random weights in place of the files'."""
    misshapen = [
        f"{name} (in the file {list(found)}, by the config {list(wanted)})"
        for name, found, wanted in info["mismatched_keys"]
    ]
    for what, names in (("missing", info["missing_keys"]), ("of another shape", misshapen)):
        if names:
            raise CheckpointError(
                f"{model}: {len(names)} tensors of {type(loaded).__name__} are {what}, for instance "
                f"{', '.join(sorted(names)[:3])}. The files and config.json do not belong together: fetch the model again."
            )


def _place_of(model: str | Path, kwargs: dict[str, Any]) -> Path:
    """The folder that ``from_pretrained`` reads a model from, after the checks that every other use of it makes.

    Takes what is for the hub out of ``kwargs``, and puts in what a GGUF file needs.
    """
    path = Path(model)
    if path.is_file():
        open_config(path)
        kwargs["gguf_file"] = path.name
        return path.parent
    if not path.is_dir():
        offline, revision = kwargs.pop("local_files_only", False), kwargs.pop("revision", None)
        path = hub_folder(str(model), revision, offline, weights=True)
    load_config(path, str(model), allow_quantized=True)
    for file in weight_files(path):
        read_header(file)
    return path


def is_torchao(model: PreTrainedModel) -> bool:
    """Whether weights of a model are tensors of torchao, in few bits."""
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer is not None and quantizer.quantization_config.quant_method == "torchao"


class _Factors:
    """The tensors of a compressed model, made one target at a time from source weights and stored bases."""

    def __init__(
        self,
        weights: Weights,
        structure: Structure,
        ranks: dict[str, int],
        analysis: Analysis,
        finals: FinalFactors | None,
        device: torch.device,
        reporter: Reporter,
    ):
        self._weights, self._ranks, self._device = weights, ranks, device
        self._analysis, self._finals = analysis, finals
        self.targets = {target.name: target for target in structure.targets}
        self._owners = {name: target for target in structure.targets for name in target.linears}
        self._made: tuple[str, dict[str, Tensor]] = ("", {})
        self._reporter, self._num_blocks = reporter, len(structure.blocks)

    def get(self, name: str) -> Tensor:
        for leaf in ("svd_v.weight", "svd_u.weight", "svd_u.bias"):
            if name.endswith(leaf):
                linear = name.removesuffix(f".{leaf}")
                target = self._owners[linear]
                if leaf == "svd_u.bias" and not target.bias_corrected:
                    return self._weights.get(f"{linear}.bias")
                factor = self._factors_of(target)[leaf]
                return factor if leaf == "svd_v.weight" else target.split(factor)[linear].contiguous()
        return self._refitted(name) if self._finals is not None else self._weights.get(name)

    def _refitted(self, name: str) -> Tensor:
        """A dense tensor as in the source, unless a sequential calibration has fitted it to the compressed stream."""
        linear = name.removesuffix(".weight")
        stored, target = self._weights.get(name), self._owners.get(linear)
        if target is None or self._finals is None or "weight" not in (fitted := self._finals.of(target)):
            return stored
        weight_OI = target.split(fitted["weight"])[linear]
        return _as(weight_OI.mT if target.is_conv1d else weight_OI, stored)

    def _factors_of(self, target: Target) -> dict[str, Tensor]:
        if self._made[0] != target.name:
            stored = [self._weights.get(f"{name}.weight") for name in target.linears]
            made = self._sliced(target, stored) if self._finals is None else self._finals.of(target)
            self._made = (target.name, {leaf: _as(factor, stored[0]) for leaf, factor in made.items()})
            for leaf, factor in self._made[1].items():
                if not bool(torch.isfinite(factor).all()):
                    raise NumericalError(
                        f"{target.name}.{leaf} overflows {stored[0].dtype}; leave it dense with --ignore."
                    )
            self._reporter.advance(target.block + 1, self._num_blocks)
        return self._made[1]

    def _sliced(self, target: Target, stored: Sequence[Tensor]) -> dict[str, Tensor]:
        weight_OI = target.stacked(stored).to(self._device)
        spectrum = self._analysis.spectrum(target).to(self._device)
        u_OR, v_RI = factorise(weight_OI, spectrum, self._ranks[target.name])
        factors = {"svd_u.weight": u_OR, "svd_v.weight": v_RI}
        if target.bias_corrected:
            mean_I = self._analysis.mean(target).to(self._device)
            biases = [self._weights.get(f"{name}.bias") for name in target.linears if target.has_bias]
            bias_O = torch.cat(biases).to(self._device) if biases else None
            factors["svd_u.bias"] = corrected_bias(weight_OI, u_OR, v_RI, mean_I, mean_I, bias_O)
        return factors


def write_shards(folder: Path, tensors: Any, layout: Tensors, stem: str = "model") -> None:
    """Safetensors files of at most ``SHARD_BYTES`` (but whole pairs of factors), and their index if there are several."""
    shards = shard_names(layout, SHARD_BYTES)
    index: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        save_tensors({name: tensors.get(name).cpu().contiguous() for name in names}, folder / file)
        index.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        content = {"metadata": {"total_size": tensor_bytes(layout)}, "weight_map": dict(sorted(index.items()))}
        (folder / f"{stem}.safetensors.index.json").write_text(
            json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )


def _write_elastic(
    folder: Path, factors: _Factors, stored: Tensors, layout: Tensors, analysis: Analysis, allocation: str
) -> None:
    """The files of which smaller sizes are made, beside the weights of the checkpoint that are in the folder already."""
    write_shards(folder, _WithEnergies(factors, analysis), layout, ELASTIC_STEM)
    weights = {path.name: sha256_of(path) for path in weight_files(folder)}
    ElasticIndex(stored=stored, probes=analysis.read_probes(allocation), weights=weights).write(folder)


class _WithEnergies:
    """Factors, and the energies of every target as ``<target>.energies``."""

    def __init__(self, factors: _Factors, analysis: Analysis):
        self._factors, self._analysis = factors, analysis

    def get(self, name: str) -> Tensor:
        target = self._factors.targets.get(name.removesuffix(".energies"))
        return self._factors.get(name) if target is None else self._analysis.energies(target)


def ranks_entry(structure: Structure, ranks: Mapping[str, int]) -> dict[str, Any]:
    """What ``config.json`` says of ranks by target: of every linear, and where several have one first factor."""
    shared = shared_factors(structure.targets, ranks)
    return {"ranks": linear_ranks(structure.targets, ranks), **({"shared_factors": shared} if shared else {})}


def _config_entry(
    source: Source, structure: Structure, plan: Plan, recipe: Recipe, provenance: Provenance
) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "base_model_type": source.config.model_type,
        **ranks_entry(structure, plan.ranks),
        **({"bias_correction": True} if recipe.bias_correction else {}),
        "library_version": __version__,
        "source": {"id": source.name, "revision": source.revision, "fingerprint": provenance.weights_fingerprint},
    }


def _copy_companions(folder: Path, source: Source, tokenizer: Any) -> None:
    if source.folder is not None:
        copy_companion_files(source.folder, folder, tokenizer=tokenizer is None)
    elif source.model is not None and source.model.generation_config is not None:
        # As it is: save_pretrained refuses settings that generate only warns about.
        (folder / GENERATION_CONFIG).write_text(source.model.generation_config.to_json_string(), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def copy_companions(folder: Path, partial: Path) -> None:
    """Of a checkpoint to one made of it: code, tokenizer and whatever else was written beside the weights, by the hashes."""
    hashed = json.loads((folder / HASHES_FILE).read_text(encoding="utf-8"))["files"]
    written_anew = {"config.json", *(path.name for path in weight_files(folder))}
    for name in hashed:
        if name not in written_anew and not name.endswith(".index.json") and not name.startswith("svdllm/"):
            (partial / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, partial / name)


def _write_reference(folder: Path, config: PreTrainedConfig, device: torch.device) -> None:
    ids, logits = reference_logits(folder, config, device)
    save_tensors({"token_ids": ids, "logits": logits}, folder / REFERENCE_FILE)


def reference_logits(folder: Path, config: PreTrainedConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """A few fixed tokens, and the logits after the last of them: float32, computed from the files of a folder.

    Raises:
        NumericalError: they are not finite.
    """
    ids = (torch.arange(REFERENCE_TOKENS).unsqueeze(0) * 7919 + 11) % config.get_text_config().vocab_size
    logits_of = _loaded_logits if getattr(config, "quantization_config", None) else _walked_logits
    logits = logits_of(folder, config, ids, device)[:, -REFERENCE_POSITIONS:].float().cpu().contiguous()
    if not bool(torch.isfinite(logits).all()):
        raise NumericalError("The compressed model's logits are not finite.")
    return ids, logits


def _walked_logits(folder: Path, config: PreTrainedConfig, ids: Tensor, device: torch.device) -> Tensor:
    """With one block resident."""
    skeleton = build_skeleton(config)
    weights = SafetensorsWeights(folder, skeleton)
    walk = Walk(
        weights=weights, skeleton=skeleton, structure=discover(skeleton), ids=ids, device=device, dtype=torch.float32
    )
    for block in walk.blocks():
        block.run()
    return walk.logits()


@torch.no_grad()
def _loaded_logits(folder: Path, config: PreTrainedConfig, ids: Tensor, device: torch.device) -> Tensor:
    """Of weights in few bits, which only the loaded model can read."""
    model = load_model(folder, dtype=torch.float32).to(device)  # type: ignore[arg-type]
    return model.eval()(input_ids=ids.to(device)).logits


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to("cpu", like.dtype).contiguous()
