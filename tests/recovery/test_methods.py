"""A recovery method is added by its own file and one line of the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from runs import TEXT, run
from svdllm import InputError, recover
from svdllm.cli import main
from svdllm.common.settings import setting
from svdllm.recovery.method import Method
from svdllm.recovery.methods import METHODS
from svdllm.recovery.models import Models
from svdllm.recovery.settings import Recovery, make_recovery, users_of
from svdllm.recovery.stage import Task, Trained
from svdllm.recovery.training_settings import Schedule, TrainingSettings


class NormSettings(TrainingSettings):
    final_norm: bool = setting(True, "Also train the last norm.", panel="Training")


class Norms(Method):
    """Trains the norms and nothing else."""

    name = "norms"
    summary = "the norms alone, on the text"
    defaults = Schedule(lr=1e-2, batch=4, seqlen=16, steps=3)
    Settings = NormSettings

    def train(self, task: Task, models: Models) -> Trained:
        from svdllm.recovery.training import train

        model = models.compressed(torch.float32)
        final = cast(NormSettings, task.settings).final_norm if isinstance(task.settings, NormSettings) else True
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name and (final or "layers" in name))
        return train(model, task)


class WithNorms(NormSettings, Recovery):
    """What ``Recovery`` is once the line stands in the table."""


@pytest.fixture(autouse=True)
def _in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "norms", Norms())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, dense: Path) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    (folder / "text.txt").write_text(TEXT)
    return run(dense, folder / "small").output_dir


def changed(before: Path, after: Path) -> set[str]:
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    return {name for name in old if not torch.equal(old[name], new[name])}


def settings(checkpoint: Path, **given: Any) -> dict[str, Any]:
    return {"methods": ("norms",), "data": str(checkpoint.parent / "text.txt")} | given


def test_a_method_trains_by_its_own_defaults(checkpoint: Path, tmp_path: Path) -> None:
    result = recover(checkpoint, tmp_path / "out", make_recovery(settings(checkpoint)))
    norms = {name for name in load_file(checkpoint / "model.safetensors") if "norm" in name}
    assert changed(checkpoint, result.output_dir) == norms
    assert [(stage.stage, stage.steps) for stage in result.stages] == [("norms", 3)]
    assert result.tokens == 3 * 4 * 16


def test_a_method_has_settings_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    result = recover(checkpoint, tmp_path / "out", WithNorms(**settings(checkpoint, final_norm=False)))
    assert changed(checkpoint, result.output_dir) == {
        f"model.layers.{layer}.{name}_layernorm.weight" for layer in (0, 1) for name in ("input", "post_attention")
    }
    assert users_of("final_norm") == ["norms"]
    with pytest.raises(ValueError, match="final_norm does nothing to distill: it is for norms"):
        WithNorms(**settings(checkpoint, methods=("distill",), final_norm=False))
    with pytest.raises(InputError, match="r does nothing to norms: it is for sequential-lora"):
        make_recovery(settings(checkpoint, r=2))


def test_a_method_runs_beside_others_from_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    text = checkpoint.parent / "text.txt"
    arguments = ["recover", checkpoint, "-o", tmp_path / "out", "--data", text, "--method", "norms,sequential-lora"]
    arguments += ["--steps", 2, "--batch", 2, "--seqlen", 16, "--ppl", "none"]
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    assert not done.value.code
    assert any("norm" in name for name in changed(checkpoint, tmp_path / "out"))
    assert any("svd_u" in name for name in changed(checkpoint, tmp_path / "out"))


def test_an_unknown_method_is_told_what_there_is(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="'distill' or 'norms'"):
        make_recovery(settings(checkpoint, methods=("norm",)))


@pytest.mark.parametrize("name", ["sequential-lora", "blockwise", "distill", "norms"])
def test_settings_reach_the_schedule_of_every_method(name: str) -> None:
    given = make_recovery({"methods": (name,), "data": "x", "teacher": "y", "lr": 0.5, "batch": 3, "seqlen": 7})
    assert given.schedule(name).lr == 0.5
    assert (given.schedule(name).batch, given.schedule(name).seqlen) == (3, 7)
    default = make_recovery({"methods": (name,), "data": "x", "teacher": "y"})
    assert default.schedule(name) == METHODS[name].defaults
    assert default.within(5).schedule(name).seqlen == 5


def test_epochs_take_the_place_of_default_steps_only_where_all_methods_count_steps() -> None:
    alone = make_recovery({"methods": ("distill",), "data": "x", "epochs": 2})
    assert (alone.schedule("distill").steps, alone.schedule("distill").epochs) == (None, 2)
    both = make_recovery({"methods": ("blockwise", "distill"), "data": "x", "teacher": "y", "epochs": 2})
    assert both.schedule("distill").steps == METHODS["distill"].defaults.steps
    assert both.schedule("blockwise").epochs == 2
