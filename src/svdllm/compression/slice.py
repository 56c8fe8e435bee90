"""Smaller sizes of an elastic checkpoint: in seconds, without the source and without calibration text.

The ranks are chosen as a run at that ratio would choose them, from the same energies and probes. The factors are the
first columns and rows of those stored, which is bit for bit what such a run writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from svdllm.checkpoint import load
from svdllm.checkpoint.elastic import ELASTIC_STEM, ElasticIndex, SlicedTensors, TensorFiles
from svdllm.checkpoint.finish import RECIPE_FILE, copy_companions, finish_checkpoint
from svdllm.checkpoint.output import new_folder
from svdllm.checkpoint.report import read_report
from svdllm.checkpoint.shards import write_shards
from svdllm.checkpoint.tensors import Tensors, compressed_tensors
from svdllm.common.errors import CheckpointError, InputError
from svdllm.common.memory import device_peak_bytes, peak_bytes
from svdllm.common.progress import Reporter
from svdllm.compression.plan import Plan, make_plan, structure_for
from svdllm.compression.ranks import Evidence
from svdllm.compression.ranks.budget import spare_ranks
from svdllm.compression.recipe import Recipe, load_settings, make_recipe
from svdllm.compression.records import CompressionResult, LinearRecord, Provenance, linear_record
from svdllm.compression.room import require_room
from svdllm.compression.write import ranks_entry, report_of
from svdllm.models.config_files import load_config
from svdllm.models.low_rank import HASHES_FILE, compare_hashes, family_classes
from svdllm.models.low_rank.factory import dense_config
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.open import Source
from svdllm.models.safetensors_files import weight_files
from svdllm.models.skeleton import build_skeleton
from svdllm.models.structure import Structure, linear_ranks


def slice_checkpoint(
    folder: str | Path,
    ratio: float,
    output_dir: str | Path,
    *,
    device: str | None = None,
    reporter: Reporter | None = None,
) -> CompressionResult:
    """Writes the checkpoint of a smaller size that is in an elastic one.

    All files but the report are those of ``compress`` at that ratio with the same options and without ``elastic``.

    Args:
        folder: an elastic checkpoint.
        ratio: share of the compressed linears' parameters that is removed; at least the checkpoint's own.
        output_dir: made by this call; must not exist, or be empty.
        device: where the reference logits are computed; by default where the recipe says.
        reporter: is told about stages and progress.

    Raises:
        InputError: the folder is not elastic, the ratio is not in it, or the output exists; nothing is left behind.
        CheckpointError: a file is not as it was written; names it.
        ResourceError: the disk does not suffice.
    """
    reporter = reporter or Reporter()
    with new_folder(output_dir, "a slice") as (output, partial):
        with reporter.stage("check", 1):
            cut = _open(folder, ratio, device)
            require_room(output, cut.plan)
        linears = cut.linears()
        with reporter.stage("write", 1):
            _write(cut, linears, partial, reporter)
    return CompressionResult(
        output_dir=output.path,
        recipe=cut.recipe,
        plan=cut.plan,
        linears=linears,
        seconds=dict(reporter.seconds),
        peak_ram_bytes=peak_bytes(),
        peak_device_bytes=device_peak_bytes(torch.device(cut.plan.device)),
        warnings=list(reporter.warnings),
    )


def _write(cut: _Slice, linears: list[LinearRecord], partial: Path, reporter: Reporter) -> None:
    (partial / "svdllm").mkdir()
    write_shards(partial, cut.tensors, cut.layout)
    copy_companions(cut.folder, partial)
    (partial / "config.json").write_text(
        json.dumps(cut.config_fields, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    report = report_of(cut.plan, cut.recipe, cut.provenance, linears)
    # It is the run's, and says by which versions that was made.
    report |= {
        "versions": cut.report["versions"],
        "unused_tensors": cut.report.get("unused_tensors"),
        "sliced_from": {"ratio": cut.report["recipe"]["ratio"]},
    }
    finish_checkpoint(partial, cut.recipe.to_yaml(), report, torch.device(cut.plan.device), reporter)


def load_model(model: str | Path, *, ratio: float | None = None, **kwargs: Any) -> PreTrainedModel:
    """Loads a model by ``from_pretrained``, compressed or not, with svdllm's errors.

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
    return load.load_model(model, **kwargs) if ratio is None else load_slice(model, ratio, **kwargs)


def load_slice(folder: str | Path, ratio: float, **kwargs: Any) -> PreTrainedModel:
    """The model that ``slice_checkpoint`` writes, in memory; ``kwargs`` are those of ``from_pretrained``.

    Raises:
        InputError, CheckpointError: as ``slice_checkpoint``.
    """
    cut = _open(folder, ratio, "cpu", check_integrity=kwargs.pop("check_integrity", True))
    classes = family_classes(cut.source.config.model_type)
    dtypes = {key: kwargs.pop(key) for key in ("dtype", "torch_dtype") if key in kwargs}
    config, kwargs = classes.config.from_dict(cut.config_fields, return_unused_kwargs=True, **kwargs)
    tensors = {name: cut.tensors.get(name) for name in cut.layout}
    loaded: Any = classes.causal_lm.from_pretrained(None, config=config, state_dict=tensors, **dtypes, **kwargs)
    model = loaded[0] if kwargs.get("output_loading_info") else loaded
    model.name_or_path = model.config._name_or_path = str(cut.folder)
    if (cut.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(cut.folder)
    return loaded


@dataclass(frozen=True, kw_only=True)
class _Slice:
    """A smaller size, looked at and found to be in an elastic checkpoint."""

    folder: Path
    report: Mapping[str, Any]  # of the elastic checkpoint
    recipe: Recipe
    source: Source  # of which only the shapes are there
    structure: Structure
    evidence: Evidence
    plan: Plan
    layout: Tensors
    tensors: SlicedTensors

    @property
    def config_fields(self) -> dict[str, Any]:
        """What ``config.json`` of the size holds: all as in the elastic one's but the ranks."""
        fields = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        settings = {key: value for key, value in fields["svdllm"].items() if key != "shared_factors"}
        fields["svdllm"] = settings | ranks_entry(self.structure, self.plan.ranks)
        return fields

    @property
    def provenance(self) -> Provenance:
        return Provenance(**self.report["source"])

    def linears(self) -> list[LinearRecord]:
        seconds = {row["name"]: row["seconds"] for row in self.report["linears"]}
        energies, ranks = self.evidence.energies, self.plan.ranks
        return [linear_record(t, ranks.get(t.name), energies[t.name], seconds[t.name]) for t in self.structure.targets]


class _Shapes:
    """Weights of which only names, shapes and dtypes are known."""

    def __init__(self, stored: Tensors):
        self._stored = stored

    def names(self) -> list[str]:
        return list(self._stored)

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return self._stored[name]

    def get(self, name: str) -> Tensor:
        raise NotImplementedError(f"{name} of the dense source is not in a checkpoint made of it")


def _open(folder: str | Path, ratio: float, device: str | None, *, check_integrity: bool = True) -> _Slice:
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; of a model on the hub, download the whole repository first.")
    report = read_report(folder)
    config = load_config(folder, str(folder))
    index = ElasticIndex.read(folder)
    if check_integrity:
        _require_as_written(folder, index)
    whole = make_recipe(load_settings(folder / RECIPE_FILE), f"{RECIPE_FILE} in {folder}")
    recipe = _recipe_at(whole, ratio, folder)
    source = Source(
        name=report["source"]["model"],
        revision=report["source"]["revision"],
        config=dense_config(config),
        folder=folder,
        weights=_Shapes(index.stored),
    )
    skeleton = build_skeleton(source.config)
    structure = structure_for(skeleton, recipe)
    elastic = TensorFiles(sorted((folder / ELASTIC_STEM).parent.glob(f"{Path(ELASTIC_STEM).name}*.safetensors")))
    evidence = Evidence({t.name: elastic.get(f"{t.name}.energies") for t in structure.targets}, index.probes)
    plan = make_plan(
        source,
        skeleton,
        structure,
        recipe.model_copy(update={"device": device or recipe.device}),
        evidence=None if recipe.allocation == "uniform" else evidence,
    )
    info = LowRankInfo.of(config, str(folder))
    assert info is not None
    _require_nested(folder, whole, structure, info.ranks, plan.ranks, ratio)
    ranks = linear_ranks(structure.targets, plan.ranks)
    needed = {stage: plan.ram_by_stage[stage] for stage in ("now", "write", "check")}
    return _Slice(
        folder=folder,
        report=report,
        recipe=recipe,
        source=source,
        structure=structure,
        evidence=evidence,
        plan=replace(plan, ram_by_stage=needed, disk_bytes=plan.file_bytes, hidden_states_bytes=0, seconds_by_stage={}),
        layout=compressed_tensors(index.stored, structure.targets, plan.ranks),
        tensors=SlicedTensors(TensorFiles(weight_files(folder)), elastic, info.ranks, ranks),
    )


def _require_as_written(folder: Path, index: ElasticIndex) -> None:
    if not (folder / HASHES_FILE).is_file():
        raise CheckpointError(
            f"{folder} has no {HASHES_FILE}: nothing to compare its files with before they are sliced."
        )
    problems = compare_hashes(folder)
    if problems:
        raise CheckpointError(f"{folder} is not as it was written: {' '.join(problems)} Fetch or write it again.")
    hashes = json.loads((folder / HASHES_FILE).read_text(encoding="utf-8"))["files"]
    found = {path.name: hashes.get(path.name, {}).get("sha256") for path in weight_files(folder)}
    if found != index.weights:
        raise CheckpointError(
            f"The weights in {folder} are not those that its elastic files were made with: it was trained or saved again "
            "since. Slice the checkpoint that compress wrote, then train the slice."
        )


def _recipe_at(whole: Recipe, ratio: float, folder: Path) -> Recipe:
    """The recipe of a direct run at a ratio."""
    own = whole.ratio
    if not whole.elastic or not isinstance(own, float):
        raise CheckpointError(f"{RECIPE_FILE} in {folder} is not that of an elastic checkpoint. Write it again.")
    if not 0 < ratio < 1:
        raise InputError(
            f"ratio {ratio} is not between 0 and 1: it is the share of the linears' parameters to remove (0.4: 40 %)."
        )
    if ratio < own:
        raise InputError(
            f"{folder} holds ratio {own} and what is smaller; ratio {ratio} is a larger model, which is not in it. Slice "
            f"at {own} or more, or compress with --ratio {ratio} --elastic."
        )
    return whole.model_copy(update={"ratio": ratio, "elastic": False})


def _require_nested(
    folder: Path,
    whole: Recipe,
    structure: Structure,
    stored: Mapping[str, int],
    wanted: Mapping[str, int],
    ratio: float,
) -> None:
    """Raises InputError where a rank is more than is stored: rare, and mostly at ratios very close."""
    own = {target.name: stored[target.linears[0]] for target in structure.targets if target.linears[0] in stored}
    spare = spare_ranks(whole, structure, own)
    lacking = []
    for target in structure.targets:
        held = own.get(target.name, spare.get(target.name, 0))
        rank = wanted.get(target.name)
        if (rank is None and target.name in own) or (rank is not None and rank > held):
            lacking.append(f"{target.name} is stored at rank {held}, wanted {'dense' if rank is None else rank}")
    if lacking:
        more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
        raise InputError(
            f"The model of ratio {ratio} is not within {folder}, whose ratio is {whole.ratio}: {lacking[0]}{more}. The "
            "best ranks of a smaller size are nearly always less than those of a larger one, here they are not; use a clearly "
            "larger ratio, or compress at this one."
        )
