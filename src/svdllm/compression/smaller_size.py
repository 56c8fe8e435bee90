"""Finds a smaller size in an elastic checkpoint.

The ranks are chosen as a run at the ratio would choose them, from the same energies and probes. The factors are the
first columns and rows of the stored ones, bit for bit those of such a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdllm.checkpoint.elastic import ELASTIC_STEM, ElasticIndex, SlicedTensors, TensorFiles
from svdllm.checkpoint.finish import RECIPE_FILE
from svdllm.checkpoint.report import read_report
from svdllm.checkpoint.tensors import Tensors
from svdllm.common.errors import CheckpointError, InputError
from svdllm.compression.forms import rank_of
from svdllm.compression.forms.layout import compressed_tensors, forms_entry
from svdllm.compression.math.linalg import tail_energies
from svdllm.compression.packed_slices import PackedSlices
from svdllm.compression.plan import Plan, make_plan, refine
from svdllm.compression.ranks import Evidence
from svdllm.compression.ranks.budget import spare_forms
from svdllm.compression.recipe import Recipe
from svdllm.compression.recipe_files import load_settings, make_recipe
from svdllm.compression.records import LinearRecord, Provenance, linear_record
from svdllm.compression.subject import Subject, discover_subject
from svdllm.models.chosen import Chosen, Forms
from svdllm.models.config_files import load_config
from svdllm.models.low_rank import FORMAT_VERSION, HASHES_FILE, compare_hashes
from svdllm.models.low_rank.factory import dense_config
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.open import Source
from svdllm.models.safetensors_files import weight_files
from svdllm.models.structure import Structure

_OF_A_SIZE = ("shared_factors", "ranks", "forms")  # what an entry of config.json, of either format version, says of it


@dataclass(frozen=True, kw_only=True)
class SmallerSize:
    """A smaller size that an elastic checkpoint was found to hold."""

    folder: Path
    report: Mapping[str, Any]  # of the elastic checkpoint
    recipe: Recipe
    subject: Subject  # the dense source; of its weights only the shapes are known
    evidence: Evidence
    plan: Plan
    layout: Tensors
    tensors: SlicedTensors | PackedSlices

    @property
    def config_fields(self) -> dict[str, Any]:
        """The content of ``config.json``: as in the elastic checkpoint, except for the forms."""
        fields = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        settings = {key: value for key, value in fields["svdllm"].items() if key not in _OF_A_SIZE}
        entry = forms_entry(self.subject.structure.targets, self.plan.forms)
        fields["svdllm"] = settings | {"format_version": FORMAT_VERSION} | entry
        return fields

    @property
    def provenance(self) -> Provenance:
        return Provenance(**self.report["source"])

    def linears(self) -> list[LinearRecord]:
        seconds = {row["name"]: row["seconds"] for row in self.report["linears"]}
        energies, forms = self.evidence.energies, self.plan.forms
        return [
            linear_record(target, forms.get(target.name), tail_energies(energies[target.name]), seconds[target.name])
            for target in self.subject.structure.targets
        ]


def find_size(
    folder: str | Path,
    ratio: float,
    device: str | None,
    *,
    forms: tuple[str, ...] = ("pair",),
    check_integrity: bool = True,
) -> SmallerSize:
    """Plans the size of a ratio and finds its factors in an elastic checkpoint.

    Args:
        forms: with ``packed``, the pairs are packed, and the ranks are as much larger.
        device: where the reference logits are computed; None for the device of the recipe.
        check_integrity: compare the hashes of all files first.

    Raises:
        InputError: the folder is not elastic, or the ratio is not in it.
        CheckpointError: a file is not as it was written; names it.
    """
    folder, forms = Path(folder), _made_of_pairs(forms)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder. Download the whole repository of a model on the hub first.")
    report = read_report(folder)
    config = load_config(folder, str(folder))
    index = ElasticIndex.read(folder)
    if check_integrity:
        _require_as_written(folder, index)
    whole = make_recipe(load_settings(folder / RECIPE_FILE), f"{RECIPE_FILE} in {folder}")
    recipe = _recipe_at(whole, ratio, folder, forms)
    source = Source(
        name=report["source"]["model"],
        revision=report["source"]["revision"],
        config=dense_config(config),
        folder=folder,
        weights=_Shapes(index.stored),
    )
    subject = discover_subject(source, recipe)
    targets = subject.structure.targets
    elastic = TensorFiles(sorted((folder / ELASTIC_STEM).parent.glob(f"{Path(ELASTIC_STEM).name}*.safetensors")))
    evidence = Evidence({t.name: elastic.get(f"{t.name}.energies") for t in targets}, index.probes)
    info = LowRankInfo.of(config, str(folder))
    assert info is not None
    if "packed" in forms:
        own = _own_pairs(subject.structure, info.ranks)
        held = {**spare_forms(whole, subject.structure, own), **own}
        evidence = replace(evidence, held=held, not_dense=frozenset(own))
    plan = _plan(subject, recipe.model_copy(update={"device": device or recipe.device}), evidence)
    _require_nested(folder, whole, subject.structure, info.ranks, plan.forms, ratio)
    ranks = {name: plan.forms[t.name].size for t in targets if t.name in plan.forms for name in t.linears}
    tensors = SlicedTensors(TensorFiles(weight_files(folder)), elastic, info.ranks, ranks)
    return SmallerSize(
        folder=folder,
        report=report,
        recipe=recipe,
        subject=subject,
        evidence=evidence,
        plan=plan,
        layout=compressed_tensors(index.stored, targets, plan.forms),
        tensors=PackedSlices(tensors, targets, plan.forms) if "packed" in forms else tensors,
    )


def _made_of_pairs(forms: tuple[str, ...]) -> tuple[str, ...]:
    """The forms of a slice; a linear that cannot be packed stays a pair. Raises InputError for another form."""
    if not forms or not set(forms) <= {"pair", "packed"}:
        named = ", ".join(forms) or "(none)"
        raise InputError(f"--forms {named}: an elastic checkpoint holds pairs; give pair, packed or pair,packed.")
    return ("pair", "packed") if "packed" in forms else ("pair",)


def _plan(subject: Subject, recipe: Recipe, evidence: Evidence) -> Plan:
    """The plan of a smaller size: no analysis, and the checkpoint is all that is written."""
    plan = make_plan(subject, recipe)
    if not plan.forms_known:
        plan = refine(plan, subject, evidence)
    needs = replace(
        plan.needs,
        ram_by_stage={stage: plan.needs.ram_by_stage[stage] for stage in ("now", "write", "check")},
        disk_bytes=plan.file_bytes,
        hidden_states_bytes=0,
        seconds_by_stage={},
        seconds_range=(0.0, 0.0),
    )
    return replace(plan, needs=needs)


class _Shapes:
    """Weights whose names, shapes and dtypes are known, and whose values are not."""

    def __init__(self, stored: Tensors):
        self._stored = stored

    def names(self) -> list[str]:
        return list(self._stored)

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return self._stored[name]

    def get(self, name: str) -> Tensor:
        raise NotImplementedError(f"{name} of the dense source is not in a checkpoint made of it")


def _require_as_written(folder: Path, index: ElasticIndex) -> None:
    if not (folder / HASHES_FILE).is_file():
        raise CheckpointError(f"{folder} has no {HASHES_FILE}: its files cannot be checked before they are sliced.")
    problems = compare_hashes(folder)
    if problems:
        raise CheckpointError(f"{folder} is not as it was written: {' '.join(problems)} Fetch or write it again.")
    hashes = json.loads((folder / HASHES_FILE).read_text(encoding="utf-8"))["files"]
    found = {path.name: hashes.get(path.name, {}).get("sha256") for path in weight_files(folder)}
    if found != index.weights:
        raise CheckpointError(
            f"The weights in {folder} do not belong to its elastic files: the model was trained or saved again "
            "since. Slice the checkpoint that compress wrote, then train the slice."
        )


def _recipe_at(whole: Recipe, ratio: float, folder: Path, forms: tuple[str, ...]) -> Recipe:
    """The recipe with which a run would make the size of a ratio directly."""
    own = whole.ratio
    if not whole.elastic or not isinstance(own, float):
        raise CheckpointError(
            f"{RECIPE_FILE} in {folder} does not belong to an elastic checkpoint. Write the checkpoint again."
        )
    if not 0 < ratio < 1:
        raise InputError(
            f"ratio {ratio} is not between 0 and 1: it is the share of the linears' parameters to remove (0.4: 40 %)."
        )
    if ratio < own:
        raise InputError(
            f"{folder} holds models of ratio {own} or more; ratio {ratio} is a larger model, which it does not hold. "
            f"Slice at {own} or more, or compress with --ratio {ratio} --elastic."
        )
    return make_recipe(whole.to_dict() | {"ratio": ratio, "elastic": False, "forms": forms}, f"A slice of {folder}")


def _own_pairs(structure: Structure, stored: Mapping[str, int]) -> dict[str, Chosen]:
    """The pairs that an elastic checkpoint itself holds, by target."""
    return {t.name: Chosen("pair", stored[t.linears[0]]) for t in structure.targets if t.linears[0] in stored}


def _require_nested(
    folder: Path,
    whole: Recipe,
    structure: Structure,
    stored: Mapping[str, int],
    wanted: Forms,
    ratio: float,
) -> None:
    """Raises InputError if a rank exceeds the stored one, which happens at ratios close to the stored one."""
    own = _own_pairs(structure, stored)
    held_forms = {**spare_forms(whole, structure, own), **own}
    lacking = []
    for target in structure.targets:
        held = held_forms[target.name].size if target.name in held_forms else 0
        rank = rank_of(wanted.get(target.name))
        if (rank is None and target.name in own) or (rank is not None and rank > held):
            lacking.append(f"{target.name} is stored at rank {held}, wanted {'dense' if rank is None else rank}")
    if lacking:
        more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
        raise InputError(
            f"The model of ratio {ratio} is not within {folder}, whose ratio is {whole.ratio}: {lacking[0]}{more}. The "
            "best ranks of a smaller model are nearly always below those of a larger one, but not here; use a clearly "
            "larger ratio, or compress at this one."
        )
