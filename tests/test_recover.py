"""Recovery on tiny models: what is trained, what stays, what is written, and that a killed run goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from runs import TEXT, run, save_dense, small_recipe
from svdllm import InputError, NumericalError, load_model, recover, verify
from svdllm.checkpoint import read_report
from svdllm.cli import main
from svdllm.modeling.lowrank import write_hashes
from svdllm.progress import Reporter
from svdllm.recover import make_recovery
from svdllm.recover.distill import divergence_from
from svdllm.recover.settings import DEFAULTS

SMALL = {"seqlen": 16, "batch": 4, "steps": 4, "lr": 1e-2}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return save_dense(tmp_path_factory.mktemp("dense") / "tiny", tokenizer=tokenizer)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, dense: Path) -> Path:
    return run(dense, tmp_path_factory.mktemp("out") / "small").output_dir


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


def recovery(text: Path, *methods: str, **settings: Any) -> Any:
    return make_recovery({"methods": methods or ("sequential-lora",), "data": str(text)} | SMALL | settings)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def factors(folder: Path, leaf: str) -> set[str]:
    return {name for name in weights(folder) if name.endswith(f".{leaf}.weight")}


def test_both_factors_change_by_adapters_of_the_rank_that_was_asked_for(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    result = recover(checkpoint, tmp_path / "out", recovery(text, r=2))
    assert changed(checkpoint, result.output_dir) == factors(checkpoint, "svd_u") | factors(checkpoint, "svd_v")
    old, new = weights(checkpoint), weights(result.output_dir)
    for name in changed(checkpoint, result.output_dir):
        values = torch.linalg.svdvals((new[name] - old[name]).double())
        assert values[1] > 0
        assert values[2] < 1e-4 * values[0]
    assert [stage.stage for stage in result.stages] == ["lora svd_u", "lora svd_v"]
    assert result.tokens == 2 * 4 * 4 * 16
    assert (result.output_dir / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()
    verify(result.output_dir, "cpu")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(("order", "first"), [("u-first", "svd_u"), ("v-first", "svd_v")])
def test_the_other_factor_is_frozen_until_its_turn(
    order: str, first: str, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    """Killed between the stages: what is kept is the first factor alone."""
    with pytest.raises(KeyboardInterrupt):
        recover(checkpoint, tmp_path / "out", recovery(text, order=order), reporter=Killer("lora", at=5))
    (kept,) = (tmp_path / "out.partial").glob("*.safetensors")
    assert set(load_file(kept)) == factors(checkpoint, first)


def test_joint_trains_both_at_once(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    result = recover(checkpoint, tmp_path / "out", recovery(text, order="joint"))
    assert [stage.stage for stage in result.stages] == ["lora svd_u and svd_v"]
    assert changed(checkpoint, result.output_dir) == factors(checkpoint, "svd_u") | factors(checkpoint, "svd_v")


@pytest.mark.parametrize("method", ["sequential-lora", "distill"])
def test_what_is_learnt_is_learnt(method: str, checkpoint: Path, dense: Path, text: Path, tmp_path: Path) -> None:
    """On its own training text, perplexity falls clearly."""
    teacher = None if method == "sequential-lora" else str(dense)
    settings = recovery(text, method, steps=30, **({"teacher": teacher} if teacher else {}))
    result = recover(checkpoint, tmp_path / "out", settings, ppl=[str(text)], ppl_seqlen=16)
    measured = result.perplexity[str(text)]
    if teacher is None:
        assert measured["after"].perplexity < 0.8 * measured["before"].perplexity
    else:  # nearer to the dense model, which is random here and not good at the text
        assert result.stages[0].losses[-1][1] < 0.7 * result.stages[0].losses[0][1]
        assert "teacher" in measured


def test_distillation_trains_the_linears_of_blocks_and_norms_only_if_asked(
    checkpoint: Path, dense: Path, text: Path, tmp_path: Path
) -> None:
    linears = {name for name in weights(checkpoint) if "layers" in name and "norm" not in name}
    norms = {name for name in weights(checkpoint) if "norm" in name}
    plain = recover(checkpoint, tmp_path / "plain", recovery(text, "distill", teacher=str(dense)))
    assert changed(checkpoint, plain.output_dir) == linears
    more = recover(checkpoint, tmp_path / "more", recovery(text, "distill", teacher=str(dense), train_norms=True))
    assert changed(checkpoint, more.output_dir) == linears | norms


def test_the_distillation_loss_is_the_mean_divergence_per_token() -> None:
    """Against the definition, token by token, padding left out."""

    class Model(nn.Module):
        def __init__(self, seed: int):
            super().__init__()
            self.table = torch.randn(10, 7, generator=torch.Generator().manual_seed(seed))

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return type("Output", (), {"logits": self.table[input_ids]})

    teacher, student = Model(0), Model(1)
    ids = torch.tensor([[1, 2, 3], [4, 0, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    loss = divergence_from(teacher)(student, {"input_ids": ids, "attention_mask": mask})
    expected = []
    for token in (1, 2, 3, 4):
        p, q = teacher.table[token].double().softmax(-1), student.table[token].double().softmax(-1)
        expected.append((p * (p / q).log()).sum())
    assert float(loss) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


def test_steps_of_several_micro_batches_are_steps_of_the_whole_batch(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    whole = recover(checkpoint, tmp_path / "whole", recovery(text, micro_batch=4))
    parts = recover(checkpoint, tmp_path / "parts", recovery(text, micro_batch=1))
    one, other = weights(whole.output_dir), weights(parts.output_dir)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-4)


def test_blocks_come_nearer_to_the_dense_blocks(
    checkpoint: Path, dense: Path, text: Path, tmp_path: Path, tokenizer: Any
) -> None:
    """Measured on the whole models, without the walk: the hidden states of every block."""
    settings = recovery(text, "blockwise", teacher=str(dense), samples=16, epochs=20, lr=3e-3)
    result = recover(checkpoint, tmp_path / "out", settings)
    ids = torch.tensor(tokenizer(TEXT)["input_ids"][:512]).view(-1, 16)

    def states(folder: Path) -> Any:
        model = load_model(folder, dtype=torch.float32)
        with torch.no_grad():
            return model(ids, output_hidden_states=True).hidden_states

    wanted, before, after = states(dense), states(checkpoint), states(result.output_dir)
    for index in range(1, len(wanted)):
        assert (after[index] - wanted[index]).norm() < (before[index] - wanted[index]).norm()
    in_blocks = {name for name in weights(checkpoint) if "layers" in name}
    assert changed(checkpoint, result.output_dir) == in_blocks


def test_methods_run_one_after_the_other(checkpoint: Path, dense: Path, text: Path, tmp_path: Path) -> None:
    settings = recovery(text, "blockwise", "distill", teacher=str(dense), samples=8, epochs=1)
    result = recover(checkpoint, tmp_path / "out", settings)
    assert [stage.stage for stage in result.stages] == ["blockwise", "distill"]
    again = recover(result.output_dir, tmp_path / "again", recovery(text))
    history = read_report(again.output_dir)["recovery"]
    assert [entry["settings"]["methods"] for entry in history] == [["blockwise", "distill"], ["sequential-lora"]]
    assert history[0]["tokens"] == result.tokens


def test_two_processes_do_the_steps_of_one(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    alone = recover(checkpoint, tmp_path / "alone", recovery(text, micro_batch=2, device="cpu"))
    flags = {
        "--seqlen": 16,
        "--batch": 4,
        "--steps": 4,
        "--lr": 1e-2,
        "--micro-batch": 2,
        "--ppl": "none",
        "--device": "cpu",
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "svdllm", "recover", checkpoint, "-o", tmp_path / "out", "--data", text, "--json"]
    command += [part for pair in flags.items() for part in pair]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == alone.tokens
    one, two = weights(alone.output_dir), weights(tmp_path / "out")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-4)


class Killer(Reporter):
    """Interrupts a run as a user would."""

    def __init__(self, stage: str, at: int):
        super().__init__()
        self.left, self.wanted, self.inside = at, stage, False

    def start_stage(self, name: str, steps: int) -> None:
        self.inside = name.startswith(self.wanted)

    def advance(self, done: int, steps: int) -> None:
        self.left -= self.inside
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("methods", "stage", "at"),
    [
        (("sequential-lora",), "lora", 3),
        (("sequential-lora",), "lora", 6),
        (("distill",), "distill", 3),
        (("blockwise",), "blockwise", 1),
    ],
)
def test_a_killed_run_ends_where_the_whole_one_does(
    methods: tuple[str, ...], stage: str, at: int, checkpoint: Path, dense: Path, text: Path, tmp_path: Path
) -> None:
    settings = recovery(text, *methods, teacher=str(dense), samples=8)
    whole = recover(checkpoint, tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        recover(checkpoint, tmp_path / "out", settings, reporter=Killer(stage, at))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"lr was 0\.01, is now 0\.02"):
        recover(checkpoint, tmp_path / "out", recovery(text, *methods, teacher=str(dense), samples=8, lr=0.02))
    assert not changed(whole.output_dir, recover(checkpoint, tmp_path / "out", settings).output_dir)


def test_a_loss_that_is_no_number_stops_with_step_and_layer_and_keeps_what_was_saved(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    tensors = weights(broken)
    name = "model.layers.1.mlp.down_proj.svd_u.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    write_hashes(broken)
    with pytest.raises(NumericalError, match=r"loss is nan in step 1, first in .*layers\.1\.mlp\.down_proj"):
        recover(broken, tmp_path / "out", recovery(text))
    assert (tmp_path / "out.partial").is_dir()


def test_a_gradient_that_is_no_number_stops_before_the_weights(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from svdllm.recover import training

    class Poisoned(training._Trainer):
        def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            parameter = next(p for p in model.parameters() if p.requires_grad)
            if self.state.global_step == 2:
                parameter.register_hook(lambda gradient: gradient * float("inf"))
            return super().training_step(model, *args, **kwargs)

    monkeypatch.setattr(training, "_Trainer", Poisoned)
    with pytest.raises(NumericalError, match=r"gradient of .*svd_u.* is not finite in step 3"):
        recover(checkpoint, tmp_path / "out", recovery(text))
    assert list((tmp_path / "out.partial").glob("*/checkpoint-2"))  # the last good step


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ("lora",)}, "unknown method 'lora'; known are sequential-lora, blockwise, distill"),
        ({"methods": ("blockwise",)}, "blockwise needs --teacher"),
        ({"data": "no-such-file.json"}, "file not found: no-such-file.json"),
        ({"order": "both"}, "order: .*u-first.*found 'both'"),
        ({"lr": -1.0}, "lr: .*greater than 0 .found -1"),
        ({"ranks": 3}, "ranks: Extra inputs"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_done(
    settings: dict[str, Any], message: str, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        recover(checkpoint, tmp_path / "out", make_recovery({"data": str(text)} | settings))
    assert not list(tmp_path.iterdir())


def test_only_our_checkpoints_and_their_own_teachers(
    checkpoint: Path, dense: Path, text: Path, tmp_path: Path, tokenizer: Any
) -> None:
    with pytest.raises(InputError, match="is no svdllm checkpoint"):
        recover(dense, tmp_path / "out", recovery(text))
    from families import tiny_model

    tiny_model("llama", vocab_size=310).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"310 tokens in its vocabulary.* has 300"):
        recover(checkpoint, tmp_path / "out", recovery(text, "distill", teacher=str(tmp_path / "other")))
    with pytest.raises(InputError, match="is a finished checkpoint"):
        recover(checkpoint, checkpoint, recovery(text))


def test_an_elastic_checkpoint_becomes_an_ordinary_one(dense: Path, text: Path, tmp_path: Path) -> None:
    elastic = run(dense, tmp_path / "elastic", recipe=small_recipe(elastic=True)).output_dir
    trained = recover(elastic, tmp_path / "out", recovery(text)).output_dir
    assert not list((trained / "svdllm").glob("elastic*"))
    verify(trained, "cpu")


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "qwen3"])
def test_every_family_is_trained(family: str, text: Path, tmp_path: Path, tokenizer: Any) -> None:
    dense = save_dense(tmp_path / "dense", family, tokenizer=tokenizer)
    small = run(dense, tmp_path / "small").output_dir
    settings = recovery(
        text, "sequential-lora", "blockwise", "distill", teacher=str(dense), samples=4, epochs=1, steps=2
    )
    result = recover(small, tmp_path / "out", settings)
    verify(result.output_dir, "cpu")
    assert factors(small, "svd_u") <= changed(small, result.output_dir)


def test_command_line(checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["recover", str(checkpoint), "-o", str(tmp_path / "out"), "--data", str(text), "--seqlen", "16"]
    training = [
        "--batch",
        "4",
        "--steps",
        "2",
        "--ppl",
        str(text),
        "--ppl-windows",
        "1",
        "--ppl-seqlen",
        "16",
        "--json",
    ]
    with pytest.raises(SystemExit) as done:
        main([*arguments, *training])
    assert not done.value.code
    printed = json.loads(capsys.readouterr().out)
    assert printed["tokens"] == 2 * 2 * 4 * 16
    assert {"before", "after"} == set(printed["perplexity"][str(text)])
    with pytest.raises(SystemExit) as done:
        main(["inspect", str(tmp_path / "out")])
    assert "sequential-lora" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--method", "distil"])
    assert done.value.code == 2


def test_defaults_are_those_that_help_tells(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        main(["recover", "--help"])
    text = capsys.readouterr().out
    assert DEFAULTS["sequential-lora"]["lr"] == DEFAULTS["blockwise"]["lr"] == 1e-4
    assert f"1e-4, distill {DEFAULTS['distill']['lr']:.0e}".replace("e-0", "e-") in text
