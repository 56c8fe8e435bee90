"""Recovery on tiny models: what is trained, what stays, what is written, and that a killed run goes on."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoTokenizer

import sharded_step
from runs import TEXT, run, save_dense, small_recipe
from svdllm import InputError, NumericalError, ResourceError, load_model, perplexity, recover, verify
from svdllm.checkpoint.report import read_report
from svdllm.cli import main
from svdllm.common.progress import Reporter
from svdllm.data import evaluation_tokens
from svdllm.models.low_rank.lowrank import write_hashes
from svdllm.recovery import blockwise, make_recovery, training
from svdllm.recovery.blockwise import train_blocks
from svdllm.recovery.distill import distillation_loss
from svdllm.recovery.methods import METHODS
from svdllm.recovery.settings import Recovery
from svdllm.recovery.training_settings import OF_MEMORY

SMALL = {"seqlen": 16, "batch": 4, "steps": 4, "lr": 1e-2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, dense: Path) -> Path:
    return run(dense, tmp_path_factory.mktemp("out") / "small").output_dir


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of unequal length, prompts and answers."""
    file = tmp_path_factory.mktemp("instructions") / "instructions.json"
    words = TEXT.split()
    rows = [
        {"prompt": " ".join(words[n : n + 1 + n % 5]) + " ", "completion": " ".join(words[: 1 + 3 * (n % 4)])}
        for n in range(16)
    ]
    file.write_text(json.dumps(rows))
    return file


def recovery(text: Path, *methods: str, **settings: Any) -> Any:
    small = {name: value for name, value in SMALL.items() if name != "steps" or methods != ("blockwise",)}
    return make_recovery({"methods": methods or ("sequential-lora",), "data": str(text)} | small | settings)


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
    resumed = recover(checkpoint, tmp_path / "out", recovery(text, order=order), ppl=[str(text)], ppl_seqlen=16)
    ids = evaluation_tokens(str(text), AutoTokenizer.from_pretrained(checkpoint))
    for name, folder in (("before", checkpoint), ("after", resumed.output_dir)):
        expected = perplexity(load_model(folder, dtype=torch.float32), ids, seqlen=16, max_windows=16).perplexity
        assert resumed.perplexity[str(text)][name].perplexity == pytest.approx(expected, rel=1e-6)


def test_joint_trains_both_at_once(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    result = recover(checkpoint, tmp_path / "out", recovery(text, order="joint"))
    assert [stage.stage for stage in result.stages] == ["lora svd_u and svd_v"]
    assert changed(checkpoint, result.output_dir) == factors(checkpoint, "svd_u") | factors(checkpoint, "svd_v")


@pytest.mark.parametrize("method", ["sequential-lora", "distill"])
def test_what_is_learnt_is_learnt(method: str, checkpoint: Path, dense: Path, text: Path, tmp_path: Path) -> None:
    """On its own training text, perplexity falls clearly."""
    teacher = None if method == "sequential-lora" else str(dense)
    settings = recovery(text, method, steps=30, **({"teacher": teacher, "kl": 1.0} if teacher else {}))
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


@pytest.mark.parametrize("kl", [1.0, 0.25])
def test_the_distillation_loss_is_the_divergence_and_the_cross_entropy_of_every_token(kl: float) -> None:
    """Against the definition, token by token; only where a learnt token follows."""

    class Model(nn.Module):
        def __init__(self, seed: int):
            super().__init__()
            self.table = torch.randn(10, 7, generator=torch.Generator().manual_seed(seed))

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return type("Output", (), {"logits": self.table[input_ids]})

    teacher, student = Model(0), Model(1)
    labels = torch.tensor([[-100, 2, 3, 5], [-100, -100, 6, -100]])
    ids = torch.tensor([[1, 2, 3, 5], [4, 8, 6, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    total, tokens = distillation_loss(teacher, kl)(
        student, {"input_ids": ids, "attention_mask": mask, "labels": labels}
    )
    expected = []
    for token, learnt in ((1, 2), (2, 3), (3, 5), (8, 6)):
        p, q = teacher.table[token].double().softmax(-1), student.table[token].double().softmax(-1)
        expected.append(kl * (p * (p / q).log()).sum() - (1 - kl) * q[learnt].log())
    assert int(tokens) == 4
    assert float(total) == pytest.approx(float(torch.stack(expected).sum()), rel=1e-5)


@pytest.mark.parametrize("method", ["sequential-lora", "distill"])
@pytest.mark.parametrize("other", [{"micro_batch": 1}, {"micro_batch": 3}, {"gradient_checkpointing": True}])
def test_steps_are_the_same_whatever_memory_they_take(
    method: str, other: dict[str, Any], checkpoint: Path, dense: Path, instructions: Path, tmp_path: Path
) -> None:
    """Losses are means over the learnt tokens of a whole step, though micro-batches have unequal numbers of them."""
    settings = {"teacher": str(dense), "seqlen": 64, "batch": 6, "micro_batch": 6}
    whole = recover(checkpoint, tmp_path / "whole", recovery(instructions, method, **settings))
    parts = recover(checkpoint, tmp_path / "parts", recovery(instructions, method, **(settings | other)))
    for one, two in zip(whole.stages, parts.stages, strict=True):
        assert one.tokens == two.tokens
        assert one.losses == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in two.losses]
    one, two = weights(whole.output_dir), weights(parts.output_dir)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"packing": True}, {"train_on": "everything"}, {"epochs": 2, "steps": None}])
def test_instructions_are_learnt(
    settings: dict[str, Any], checkpoint: Path, instructions: Path, tmp_path: Path
) -> None:
    """The loss of the first step against the model's own on the same rows."""
    from svdllm.data.examples import training_examples

    given = {"seqlen": 64, "batch": 16, "micro_batch": 4} | settings
    result = recover(checkpoint, tmp_path / "out", recovery(instructions, order="joint", **given))
    examples = training_examples(
        str(instructions),
        AutoTokenizer.from_pretrained(checkpoint),
        seqlen=64,
        packing=settings.get("packing", False),
        completions_only="train_on" not in settings,
    )
    total = tokens = 0.0
    model = load_model(checkpoint, dtype=torch.float32)
    for ids, labels in examples.rows:
        learnt = int((labels[1:] != -100).sum())
        with torch.no_grad():
            total += learnt * float(model(input_ids=ids[None], labels=labels[None]).loss)
        tokens += learnt
    (stage,) = result.stages
    if "packing" not in settings:  # whose rows are fewer than a batch
        assert stage.losses[0][1] == pytest.approx(total / tokens, rel=1e-4)
    assert stage.losses[-1][1] < stage.losses[0][1]
    assert stage.steps == (2 if "epochs" in settings else 4)


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


def test_two_processes_do_the_steps_of_one(checkpoint: Path, dense: Path, instructions: Path, tmp_path: Path) -> None:
    settings = {"seqlen": 64, "micro_batch": 2, "device": "cpu", "teacher": str(dense), "steps": 4}
    alone = recover(checkpoint, tmp_path / "alone", recovery(instructions, "distill", **settings))
    flags = {
        "--method": "distill",
        "--teacher": dense,
        "--seqlen": 64,
        "--batch": 4,
        "--steps": 4,
        "--lr": 1e-2,
        "--micro-batch": 2,
        "--ppl": "none",
        "--device": "cpu",
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [
        *launcher,
        "-m",
        "svdllm",
        "recover",
        checkpoint,
        "-o",
        tmp_path / "out",
        "--data",
        instructions,
        "--json",
    ]
    command += [part for pair in flags.items() for part in pair]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["tokens"] == alone.tokens
    for one, two in zip(alone.stages[0].losses, printed["stages"][0]["losses"], strict=True):
        assert one[1] == pytest.approx(two[1], rel=1e-4)
    one, two = weights(alone.output_dir), weights(tmp_path / "out")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-4)


def test_held_out_examples_are_looked_at_while_it_trains(
    checkpoint: Path, text: Path, tmp_path: Path, tokenizer: Any
) -> None:
    """Against the loss of the whole models, before and after; and it is in the logs of TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    other = tmp_path / "other.txt"
    other.write_text(TEXT[:800])
    settings = recovery(text, order="joint", eval_data=str(other), eval_steps=2, eval_samples=5)
    result = recover(checkpoint, tmp_path / "out", settings, log_dir=tmp_path / "logs")
    seen = dict(result.stages[0].held_out)
    assert list(seen) == [0, 2, 4]
    ids = torch.tensor(tokenizer(TEXT[:800])["input_ids"][: 5 * 16]).view(5, 16)
    for step, folder in ((0, checkpoint), (4, result.output_dir)):
        with torch.no_grad():
            expected = load_model(folder, dtype=torch.float32)(input_ids=ids, labels=ids).loss
        assert seen[step] == pytest.approx(float(expected), rel=1e-4)
    (folder,) = (tmp_path / "logs").iterdir()
    logs = EventAccumulator(str(folder)).Reload()
    assert {event.step: event.value for event in logs.Scalars("eval/loss")} == pytest.approx(seen)
    assert len(logs.Scalars("train/loss")) == 4


def test_held_out_loss_of_distillation_is_its_own(checkpoint: Path, dense: Path, text: Path, tmp_path: Path) -> None:
    """Distilling the dense model from itself would be zero; from the compressed one it falls."""
    settings = recovery(text, "distill", teacher=str(dense), kl=1.0, steps=20, eval_data=str(text), eval_samples=8)
    (stage,) = recover(checkpoint, tmp_path / "out", settings).stages
    assert [step for step, _ in stage.held_out] == [0, 4, 8, 12, 16, 20]
    assert stage.held_out[-1][1] < 0.8 * stage.held_out[0][1]
    assert stage.held_out[0][1] == pytest.approx(stage.losses[0][1], rel=0.3)


def test_what_is_sharded_over_processes_is_put_together_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2 on two processes: a step of theirs, merged, is a step of one."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, sharded_step.__file__, checkpoint, tmp_path / "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(training, "train", sharded_step.one_step)
    sharded_step.main(str(checkpoint), str(tmp_path / "one"))
    one, two = (load_file(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys() == factors(checkpoint, "svd_u")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-6)
        assert not torch.equal(tensor, weights(checkpoint)[name])


def test_blocks_are_trained_by_one_process(
    checkpoint: Path, dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="blockwise runs in one process, these are 2"):
        recover(checkpoint, tmp_path / "out", recovery(text, "blockwise", teacher=str(dense)))


def test_half_precision_that_would_overflow_is_refused(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="float16 is for training on a GPU"):
        recover(checkpoint, tmp_path / "out", recovery(text, dtype="float16"))
    bfloat16 = tmp_path / "bfloat16"
    shutil.copytree(checkpoint, bfloat16)
    config = json.loads((bfloat16 / "config.json").read_text())
    (bfloat16 / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    with pytest.raises(InputError, match=r"is in bfloat16, whose numbers .* Use bfloat16 or float32"):
        recover(bfloat16, tmp_path / "out", recovery(text, dtype="float16"))


def test_bfloat16_products_train_nearly_the_same(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """Adapters stay in float32; only the products are rounded."""
    plain = recover(checkpoint, tmp_path / "plain", recovery(text)).stages[0]
    half = recover(checkpoint, tmp_path / "half", recovery(text, dtype="bfloat16")).stages[0]
    for (_, one), (_, other) in zip(plain.losses, half.losses, strict=True):
        assert one != other
        assert one == pytest.approx(other, rel=0.05)


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


@pytest.mark.parametrize(("r", "alpha"), [(2, 6.0), (4, 1.0)])
def test_what_is_merged_is_alpha_over_r_times_the_adapters(
    r: int, alpha: float, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters: dict[str, torch.Tensor] = {}

    train = training.train

    def keeping(*args: Any) -> Any:
        record, trained = train(*args)
        adapters.update({name: tensor.clone() for name, tensor in trained.items()})
        return record, trained

    monkeypatch.setattr(training, "train", keeping)
    result = recover(checkpoint, tmp_path / "out", recovery(text, order="joint", r=r, alpha=alpha))
    old, new = weights(checkpoint), weights(result.output_dir)
    for name in changed(checkpoint, result.output_dir):
        a_RI, b_OR = (adapters[f"base_model.model.{name[:-7]}.lora_{leaf}.default.weight"] for leaf in "AB")
        torch.testing.assert_close(new[name] - old[name], alpha / r * b_OR @ a_RI, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["sequential-lora", "distill", "blockwise"])
def test_the_rate_rises_falls_as_a_cosine_and_weights_decay(
    method: str, checkpoint: Path, dense: Path, text: Path, tmp_path: Path
) -> None:
    """Of eight steps half are the warm-up: what every optimizer step is taken with, by hand."""
    rates, decays = [], set()

    def look(optimizer: Any, *_: Any) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        decays.add(optimizer.param_groups[0]["weight_decay"])

    own = {
        "sequential-lora": {"steps": 8, "order": "joint"},
        "distill": {"steps": 8},
        "blockwise": {"samples": 8, "epochs": 4},  # two batches, four times, in each of two blocks
    }[method]
    settings = recovery(text, method, teacher=str(dense), warmup=0.5, weight_decay=0.25, **own)
    handle = register_optimizer_step_pre_hook(look)
    try:
        recover(checkpoint, tmp_path / "out", settings)
    finally:
        handle.remove()
    falling = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    expected = [1e-2 * share for share in [0, 0.25, 0.5, 0.75, *falling]]
    assert rates == pytest.approx(expected * (2 if method == "blockwise" else 1))
    assert decays == {0.25}


def test_the_error_of_a_block_is_relative_token_by_token() -> None:
    """Tokens of norm 1 and 1000, off by half and by a tenth: 0.25 and 0.01, and not a hundredth for both."""
    wanted = torch.tensor([[[0.6, 0.8], [600.0, -800.0]]])
    found = torch.tensor([[[0.3, 0.4], [600.0, -700.0]]])
    assert blockwise._relative_errors(found, wanted).tolist() == [pytest.approx([0.25, 0.01])]
    walk: Any = SimpleNamespace(hidden=SimpleNamespace(tensor=wanted), batches=[slice(0, 1)])
    assert blockwise._mean_error([found], walk) == pytest.approx(0.13)


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
    samples = {"samples": 8} if "blockwise" in methods else {}
    settings = recovery(text, *methods, teacher=str(dense), **samples)
    whole = recover(checkpoint, tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        recover(checkpoint, tmp_path / "out", settings, reporter=Killer(stage, at))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"lr was 0\.01, is now 0\.02"):
        recover(checkpoint, tmp_path / "out", recovery(text, *methods, teacher=str(dense), lr=0.02, **samples))
    assert not changed(whole.output_dir, recover(checkpoint, tmp_path / "out", settings).output_dir)


def test_a_run_that_was_killed_while_it_saved_goes_on_from_the_save_before(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    settings = recovery(text, order="joint")
    whole = recover(checkpoint, tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        recover(checkpoint, tmp_path / "out", settings, reporter=Killer("lora", 3))
    (saved,) = (tmp_path / "out.partial").glob("*/checkpoint-*")
    half = saved.with_name("checkpoint-3")
    shutil.copytree(saved, half)
    state = (half / "trainer_state.json").read_bytes()
    (half / "trainer_state.json").write_bytes(state[: len(state) // 2])
    assert not changed(whole.output_dir, recover(checkpoint, tmp_path / "out", settings).output_dir)


# Another value of every setting that decides what is learnt.
OTHERS: dict[str, Any] = {
    "methods": ("sequential-lora", "distill", "blockwise"),
    "data": "{folder}/other.jsonl",
    "order": "v-first",
    "r": 4,
    "alpha": 3.0,
    "lr": 0.02,
    "epochs": 2,
    "samples": 12,
    "steps": 3,
    "batch": 2,
    "seqlen": 8,
    "warmup": 0.5,
    "weight_decay": 0.1,
    "clip": 0.5,
    "template": "chat",
    "train_on": "everything",
    "packing": True,
    "teacher": "{folder}/teacher",
    "kl": 0.25,
    "train_norms": True,
    "seed": 4,
    "eval_data": "{folder}/again.jsonl",
    "eval_samples": 2,
    "eval_steps": 1,
    "device": "cpu",
    "dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, dense: Path) -> Path:
    """A folder with an unfinished recovery by all methods, and copies of all that it was made of."""
    folder = tmp_path_factory.mktemp("killed")
    shutil.copytree(checkpoint, folder / "small")
    for name in ("dense", "teacher"):
        shutil.copytree(dense, folder / name)
    (folder / "small" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    words = TEXT.split()
    rows = [{"text": " ".join(words[n : n + 50]), "prompt": "the fox", "completion": words[n]} for n in range(12)]
    for name in ("rows", "other", "held-out", "again"):  # text for windows of blocks, examples for the others
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(KeyboardInterrupt):
        recover(folder / "small", folder / "out", of_all_methods(folder), reporter=Killer("lora", 1))
    return folder


def of_all_methods(folder: Path, **settings: Any) -> Any:
    given = {"samples": 8, "epochs": 1, "steps": 2, "teacher": str(folder / "dense")}
    given |= {"eval_data": str(folder / "held-out.jsonl"), "eval_samples": 3}
    return recovery(folder / "rows.jsonl", "sequential-lora", "blockwise", "distill", **(given | settings))


def refused(killed: Path, settings: Any, named: str) -> None:
    with pytest.raises((InputError, KeyboardInterrupt)) as caught:  # the second would end the session
        recover(killed / "small", killed / "out", settings, reporter=Killer("lora", 1))
    assert re.search(rf"had other settings: (.*; )?{named} was .*, is now", str(caught.value))


def test_every_setting_is_one_that_decides_or_one_of_memory() -> None:
    assert set(OTHERS) | set(OF_MEMORY) == set(Recovery.model_fields)


@pytest.mark.parametrize("name", OTHERS)
def test_an_unfinished_run_does_not_go_on_with_any_other_setting(name: str, killed: Path) -> None:
    value = OTHERS[name].format(folder=killed) if isinstance(OTHERS[name], str) else OTHERS[name]
    settings = of_all_methods(killed).model_copy(update={name: value})
    refused(killed, settings, f"recovery: {name}")


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("small/model.safetensors", "weights of the checkpoint"),
        ("small/config.json", "config of the checkpoint"),
        ("dense/model.safetensors", "teacher"),
        ("dense/config.json", "teacher"),
        ("rows.jsonl", "rows of lora svd_u"),
        ("held-out.jsonl", "rows of lora svd_u"),
    ],
)
def test_an_unfinished_run_does_not_go_on_with_anything_else_at_its_place(
    file: str, named: str, killed: Path, tmp_path: Path
) -> None:
    before = (killed / file).read_bytes()
    if file.endswith(".safetensors"):
        tensors = load_file(killed / file)
        save_file({key: tensor + 1e-3 for key, tensor in tensors.items()}, killed / file, {"format": "pt"})
    else:
        (killed / file).write_bytes(before.replace(b"1e-06", b"1e-05").replace(b"fox", b"cat"))
    assert (killed / file).read_bytes() != before
    try:
        refused(killed, of_all_methods(killed), named)
    finally:
        (killed / file).write_bytes(before)


@pytest.mark.parametrize("library", ["svdllm", "torch", "transformers"])
def test_an_unfinished_run_does_not_go_on_with_other_versions(
    library: str, killed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["svdllm.recovery.work_folder"]
    monkeypatch.setattr(module if library == "svdllm" else getattr(module, library), "__version__", "0.0.1")
    refused(killed, of_all_methods(killed), f"{library} version")


def test_an_unfinished_run_may_go_on_with_less_memory_but_not_with_other_data(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.txt"
    data.write_text(TEXT)
    with pytest.raises(KeyboardInterrupt):
        recover(checkpoint, tmp_path / "out", recovery(data), reporter=Killer("lora", 3))
    data.write_text(f"more {TEXT}")
    with pytest.raises(InputError, match="rows of lora svd_u was"):
        recover(checkpoint, tmp_path / "out", recovery(data))
    data.write_text(TEXT)
    assert recover(checkpoint, tmp_path / "out", recovery(data, micro_batch=1)).output_dir.is_dir()


def test_what_is_learnt_is_kept_when_a_later_stage_fails(
    checkpoint: Path, dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise ResourceError("no room")

    monkeypatch.setattr(blockwise, "train_blocks", fails)
    settings = recovery(text, "distill", "blockwise", teacher=str(dense), samples=4)
    with pytest.raises(ResourceError, match="no room"):
        recover(checkpoint, tmp_path / "out", settings)
    assert [file.name for file in (tmp_path / "out.partial").glob("*.safetensors")] == ["0-distill.safetensors"]


def test_a_loss_of_zero_stops(checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from svdllm.recovery import training

    plain = training._Trainer.compute_loss
    monkeypatch.setattr(training._Trainer, "compute_loss", lambda *args, **kwargs: 0 * plain(*args, **kwargs))
    with pytest.raises(NumericalError, match="loss is exactly zero in step 1"):
        recover(checkpoint, tmp_path / "out", recovery(text))


def test_a_merge_that_changes_the_answers_or_another_weight_is_noticed(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import Linear

    delta = Linear.get_delta_weight
    with monkeypatch.context() as patch:
        patch.setattr(Linear, "get_delta_weight", lambda *args: 2 * delta(*args))
        with pytest.raises(
            NumericalError, match="does not compute what the model with adapters does: the logits differ"
        ):
            recover(checkpoint, tmp_path / "out", recovery(text))
    train = training.train

    def careless(adapted: Any, *args: Any) -> Any:
        done = train(adapted, *args)
        adapted.get_submodule("base_model.model.model.norm").weight.data += 0.1
        return done

    monkeypatch.setattr(training, "train", careless)
    with pytest.raises(NumericalError, match=r"model\.norm\.weight changed while only svd_u were trained"):
        recover(checkpoint, tmp_path / "new", recovery(text))


def test_models_in_half_precision_are_merged_in_float32(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the model stays in its own dtype."""
    from svdllm.recovery.models import Models

    halved = tmp_path / "dense"
    load_model(dense, dtype=torch.bfloat16).save_pretrained(halved)
    AutoTokenizer.from_pretrained(dense).save_pretrained(halved)
    small = run(halved, tmp_path / "small").output_dir
    monkeypatch.setattr(Models, "own_dtype", property(lambda self: self.stored_dtype))
    result = recover(small, tmp_path / "out", recovery(text, dtype="bfloat16"))
    assert changed(small, result.output_dir) == factors(small, "svd_u") | factors(small, "svd_v")
    assert {tensor.dtype for tensor in weights(result.output_dir).values()} == {torch.bfloat16}


def test_a_batch_that_cannot_be_shared_is_refused(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="--batch 4 cannot be shared evenly by 3 processes"):
        recover(checkpoint, tmp_path / "out", recovery(text))


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
    from svdllm.recovery import training

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
        ({"methods": ("lora",)}, "methods.0: .*'sequential-lora', 'blockwise' or 'distill' .found 'lora'"),
        ({"methods": ("blockwise",)}, "blockwise needs --teacher"),
        ({"data": "no-such-file.json"}, "file not found: no-such-file.json"),
        ({"data": "a.txt:0.5,b.txt:0.5"}, "file not found: a.txt"),
        ({"eval_data": "python-docs:0.5,no-such:0.5"}, "no-such"),
        ({"eval_steps": 3}, "eval_steps needs eval_data"),
        ({"eval_samples": 3}, "eval_samples needs eval_data"),
        (
            {"methods": ("blockwise",), "teacher": "x", "eval_data": "python-docs"},
            "eval_data does nothing to blockwise",
        ),
        ({"methods": ("blockwise",), "teacher": "x", "steps": 3}, "steps does nothing to blockwise: it is for sequ"),
        ({"methods": ("blockwise",), "teacher": "x", "epochs": 0.4}, "blockwise makes whole passes"),
        ({"methods": ("distill",), "order": "v-first"}, "order does nothing to distill: it is for sequential-lora"),
        ({"methods": ("distill",), "kl": 0.3}, "kl needs a teacher"),
        ({"methods": ("sequential-lora",), "teacher": "x", "kl": 0.3}, "kl does nothing to sequential-lora"),
        ({"methods": ("distill",), "epochs": 2, "steps": 3}, "steps and epochs are given"),
        ({"methods": ("distill",), "packing": True, "seqlen": 16}, "--packing is for instructions and chats"),
        ({"methods": ("distill",), "epochs": 2, "seqlen": 16}, "--epochs is for instructions .* say --steps"),
        ({"template": "chat", "seqlen": 16}, "--template is for instructions and chats"),
        ({"seqlen": 65}, "--seqlen 65 is beyond the model's context of 64 tokens"),
        ({"dtype": "int8"}, "dtype: .*float32.*found 'int8'"),
        ({"order": "both"}, "order: .*u-first.*found 'both'"),
        ({"lr": -1.0}, "lr: .*greater than 0 .found -1"),
        ({"ranks": 3}, "ranks: Extra inputs"),
        ({"methods": ("nonsense",)}, r"^Recovery: methods\.0: Input should be .* .found 'nonsense'.$"),
        ({"methods": ()}, "methods: Tuple should have at least 1 item"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_done(
    settings: dict[str, Any], message: str, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        recover(checkpoint, tmp_path / "out", make_recovery({"data": str(text)} | settings))
    assert not list(tmp_path.iterdir())


def test_memory_that_cannot_suffice_is_told_before_anything_is_loaded(
    checkpoint: Path, dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, teacher = (sum(t.numel() * 4 for t in weights(folder).values()) for folder in (checkpoint, dense))
    linears = sum(t.numel() for name, t in weights(checkpoint).items() if "layers" in name and "norm" not in name)
    logits = 4 * 16 * 300 * 4
    settings = recovery(text, "distill", teacher=str(dense))
    needed = stored + 12 * linears + teacher + 5 * logits
    monkeypatch.setattr("svdllm.common.memory.available_bytes", lambda: needed - 1)
    with pytest.raises(ResourceError, match=r"--method distill need more than .* Lower --micro-batch"):
        recover(checkpoint, tmp_path / "out", settings)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("svdllm.common.memory.available_bytes", lambda: needed)
    recover(checkpoint, tmp_path / "out", settings)


def test_only_our_checkpoints_and_their_own_teachers(
    checkpoint: Path, dense: Path, text: Path, tmp_path: Path, tokenizer: Any
) -> None:
    with pytest.raises(InputError, match="is not an svdllm checkpoint"):
        recover(dense, tmp_path / "out", recovery(text))
    from families import tiny_model

    tiny_model("llama", vocab_size=310).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"310 tokens in its vocabulary.* has 300"):
        recover(checkpoint, tmp_path / "out", recovery(text, "distill", teacher=str(tmp_path / "other")))
    tiny_model("llama", vocab_size=300, num_hidden_layers=3).save_pretrained(tmp_path / "deeper")
    with pytest.raises(InputError, match=r"deeper has 3 blocks, .* has 2"):
        recover(checkpoint, tmp_path / "out", recovery(text, "blockwise", teacher=str(tmp_path / "deeper")))
    with pytest.raises(InputError, match="is a finished checkpoint"):
        recover(checkpoint, checkpoint, recovery(text))


def test_an_elastic_checkpoint_becomes_an_ordinary_one(dense: Path, text: Path, tmp_path: Path) -> None:
    elastic = run(dense, tmp_path / "elastic", recipe=small_recipe(elastic=True)).output_dir
    trained = recover(elastic, tmp_path / "out", recovery(text)).output_dir
    assert not list((trained / "svdllm").glob("elastic*"))
    verify(trained, "cpu")


def test_the_update_alone_on_plain_svd(dense: Path, text: Path, tmp_path: Path) -> None:
    """The paper's ablation, SVD-LLM (U)."""
    plain = run(dense, tmp_path / "svd", recipe=small_recipe(method="svd")).output_dir
    result = recover(plain, tmp_path / "out", recovery(text, steps=30), ppl=[str(text)], ppl_seqlen=16)
    measured = result.perplexity[str(text)]
    assert measured["after"].perplexity < 0.8 * measured["before"].perplexity
    assert read_report(result.output_dir)["method"] == "svd"


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
    lora, blockwise, distill = (METHODS[name].defaults for name in ("sequential-lora", "blockwise", "distill"))
    assert lora.lr == blockwise.lr == 1e-4
    assert f"1e-4, distill {distill.lr * 1e4:g}e-4" in text
    assert f"{lora.batch}, blockwise {blockwise.batch}, distill {distill.batch}" in text
    assert f"{lora.epochs}, blockwise {blockwise.epochs}" in text
    assert f"distill {distill.steps}" in text
    assert lora.seqlen == distill.seqlen
    assert f"{lora.seqlen}, blockwise {blockwise.seqlen}" in text


def test_blocks_that_share_keys_are_trained_on_those_of_their_own_model(
    text: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The errors that are reported, against whole models before and after."""
    walks: list[Any] = []
    monkeypatch.setattr(blockwise, "train_blocks", lambda *given: walks.extend(given) or train_blocks(*given))
    dense = save_dense(tmp_path / "dense", "gemma4_text", tokenizer=tokenizer)
    run(dense, tmp_path / "out")
    settings = recovery(text, "blockwise", teacher=str(dense), samples=8, epochs=1)
    result = recover(tmp_path / "out", tmp_path / "trained", settings)
    wanted, found = (block_outputs(tmp_path / name, walks[0].ids) for name in ("dense", "trained"))
    for (_, after), ours, theirs in zip(result.stages[0].losses, found, wanted, strict=True):
        expected = ((ours - theirs).pow(2).sum(-1) / theirs.pow(2).sum(-1)).mean()
        assert after == pytest.approx(float(expected), rel=1e-3)


def block_outputs(folder: Path, ids: torch.Tensor) -> list[torch.Tensor]:
    model, outputs = load_model(folder, dtype=torch.float32), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, output: outputs.append(output))
    with torch.no_grad():
        model(ids)
    return outputs
