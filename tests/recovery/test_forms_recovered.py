"""Recovery of checkpoints in which every form occurs: what is trained, what stays, and that the forms stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from every_form import checkpoint_of_every_form
from runs import run, save_dense, small_recipe
from svdllm import InputError, recover, verify
from svdllm.common.progress import Reporter
from svdllm.recovery import make_recovery

SMALL = {"seqlen": 16, "batch": 4, "lr": 1e-2}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return save_dense(tmp_path_factory.mktemp("forms") / "dense", "qwen2", tokenizer=tokenizer)  # which has biases


@pytest.fixture(scope="module")
def checkpoint(dense: Path) -> Path:
    return checkpoint_of_every_form(dense, dense.with_name("mixed"))


def changed(before: Path, after: Path) -> dict[str, Tensor]:
    """The differences of the tensors that are not equal."""
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert old.keys() == new.keys()
    assert (before / "config.json").read_bytes() == (after / "config.json").read_bytes()
    return {name: new[name] - old[name] for name in old if not torch.equal(old[name], new[name])}


def stored(folder: Path, *, forms: tuple[str, ...], leaves: tuple[str, ...]) -> set[str]:
    """The tensors with these ends of the linears in these forms."""
    entries = json.loads((folder / "config.json").read_text())["svdllm"]["forms"]
    owners = tuple(f"{name}." for name, entry in entries.items() if entry["form"] in forms)
    found = load_file(folder / "model.safetensors")
    return {name for name in found if name.startswith(owners) and name.endswith(leaves)}


@pytest.mark.parametrize("order", ["u-first", "v-first", "joint"])
def test_adapters_are_merged_into_packed_factors(order: str, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    settings = {"methods": ["sequential-lora"], "data": str(text), "steps": 3, "r": 2, "order": order}
    result = recover(checkpoint, tmp_path / "out", make_recovery(SMALL | settings))
    found = changed(checkpoint, result.output_dir)
    packed = stored(checkpoint, forms=("packed",), leaves=("svd_u.weight", "svd_v.weight"))
    assert len(packed) > 8
    assert set(found) == packed | stored(checkpoint, forms=("pair",), leaves=("svd_u.weight", "svd_v.weight"))
    for name in packed:
        values = torch.linalg.svdvals(found[name].double())
        assert values[1] > 0
        assert values[2] < 1e-4 * values[0]
    verify(result.output_dir, "cpu")


def test_distillation_trains_packed_biases_and_narrower_mlps(
    checkpoint: Path, dense: Path, text: Path, tmp_path: Path
) -> None:
    settings = {"methods": ["distill"], "data": str(text), "steps": 20, "teacher": str(dense), "kl": 1.0}
    result = recover(checkpoint, tmp_path / "out", make_recovery(SMALL | settings | {"lr": 3e-4}))
    found = set(changed(checkpoint, result.output_dir))
    every = load_file(checkpoint / "model.safetensors")
    left = {name for name in every if name.endswith(".order") or "norm" in name or "embed" in name}
    assert found == every.keys() - left
    assert stored(checkpoint, forms=("packed",), leaves=(".bias",)) <= found
    assert stored(checkpoint, forms=("narrow",), leaves=(".weight",)) <= found
    (stage,) = result.stages
    assert stage.losses[-1][1] < stage.losses[0][1]
    verify(result.output_dir, "cpu")


def test_blocks_of_every_form_come_nearer_to_the_dense_blocks(
    checkpoint: Path, dense: Path, text: Path, tmp_path: Path
) -> None:
    settings = {"methods": ["blockwise"], "data": str(text), "teacher": str(dense), "samples": 8, "epochs": 8}
    notes = Notes()
    result = recover(checkpoint, tmp_path / "out", make_recovery(SMALL | settings | {"lr": 3e-4}), reporter=notes)
    found = set(changed(checkpoint, result.output_dir))
    blocks = {name for name in load_file(checkpoint / "model.safetensors") if "layers" in name}
    assert found == {name for name in blocks if not name.endswith(".order")}
    for before, after in notes.errors:
        assert after < before
    verify(result.output_dir, "cpu")


class Notes(Reporter):
    """Keeps the errors that blocks are said to have before and after their training."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[tuple[float, float]] = []

    def note(self, text: str) -> None:
        if "relative error" in text:
            before, after = text.split("relative error ")[1].split(" -> ")
            self.errors.append((float(before), float(after)))


def test_a_checkpoint_without_factors_has_none_to_adapt(dense: Path, text: Path, tmp_path: Path) -> None:
    narrow = run(dense, tmp_path / "narrow", recipe=small_recipe(ranks={"mlp": {"narrow": 32}})).output_dir
    settings = {"methods": ["sequential-lora"], "data": str(text), "steps": 3}
    with pytest.raises(InputError, match=r"--method sequential-lora trains factors, and .*narrow has none: .*distill"):
        recover(narrow, tmp_path / "out", make_recovery(SMALL | settings))
    settings = {"methods": ["distill"], "data": str(text), "steps": 3}
    verify(recover(narrow, tmp_path / "out", make_recovery(SMALL | settings)).output_dir, "cpu")
