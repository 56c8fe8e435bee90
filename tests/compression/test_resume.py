"""A killed run goes on, another run does not, and nothing that is not ours is touched."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import svdllm
from families import tiny_model
from runs import TEXT, digests, run, save_dense, small_recipe, token_windows
from svdllm.common.errors import InputError
from svdllm.compression import analysis_settings

# Its processes start with the library imported.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["svdllm", "runs"])


class Deadly(svdllm.common.progress.Reporter):
    """The n-th call of a hook is the process's last act."""

    def __init__(self, where: str, nth: int):
        super().__init__()
        self.where, self.left = where, nth

    def hit(self, name: str) -> None:
        self.left -= name == self.where
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def start_stage(self, name: str, steps: int) -> None:
        self.hit(f"start {name}")

    def end_stage(self, name: str) -> None:
        self.hit(f"end {name}")

    def advance(self, done: int, steps: int) -> None:
        self.hit("advance")

    def block_done(self, *_: object) -> None:
        self.hit("block")


def dying_run(model: Path, output: Path, where: str, nth: int, settings: dict[str, Any]) -> None:
    recipe = small_recipe(**settings)
    svdllm.compress_many(model, recipe, output, calibration=token_windows(), reporter=Deadly(where, nth))


def killed_run(model: Path, output: Path, where: str, nth: int = 1, **settings: object) -> None:
    process = FORKS.Process(target=dying_run, args=(model, output, where, nth, {"ratio": (0.2, 0.4)} | settings))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("where", "nth"),
    [
        ("start tokenise", 1),
        ("end check weights", 1),
        ("advance", 25),
        ("block", 1),
        ("block", 2),
        ("start write", 2),
        ("end write", 2),
    ],
)
def test_killed_and_started_again_gives_the_same_bytes(where: str, nth: int, tmp_path: Path) -> None:
    model = save_dense(tmp_path / "dense")
    recipe, ids = small_recipe(ratio=(0.2, 0.4)), token_windows()
    svdllm.compress_many(model, recipe, tmp_path / "straight", calibration=ids)
    output = tmp_path / "out"
    killed_run(model, output, where, nth)
    assert not output.exists()
    svdllm.compress_many(model, recipe, output, calibration=ids)
    skip = tuple(f"ratio-{ratio}/svdllm/report.json" for ratio in (0.2, 0.4))
    assert digests(output, skip) == digests(tmp_path / "straight", skip)
    assert not output.with_name("out.partial").exists()


@pytest.mark.parametrize(
    ("where", "nth"),
    [
        ("start gradients", 1),  # all Grams wait on disk
        ("block", 1),  # in the middle of the reverse walk
        ("end probe", 1),
        ("end sequential", 1),  # the first ratio's factors are final, the second's are not begun
    ],
)
@pytest.mark.parametrize("others", [{"bias_correction": True}, {"forms": ("pair", "packed", "narrow")}], ids=str)
def test_killed_in_a_later_stage_and_started_again_gives_the_same_bytes(
    others: dict[str, Any], where: str, nth: int, tmp_path: Path
) -> None:
    model = save_dense(tmp_path / "dense")
    settings = {
        "ratio": (0.2, 0.4),
        "metric": "two-sided",
        "gradient_samples": 4,
        "allocation": "loss",
        "calibration_mode": "sequential",
        **others,
    }
    recipe, ids = small_recipe(**settings), token_windows()
    svdllm.compress_many(model, recipe, tmp_path / "straight", calibration=ids)
    killed_run(model, tmp_path / "out", where, nth, **settings)
    svdllm.compress_many(model, recipe, tmp_path / "out", calibration=ids)
    skip = tuple(f"ratio-{ratio}/svdllm/report.json" for ratio in (0.2, 0.4))
    assert digests(tmp_path / "out", skip) == digests(tmp_path / "straight", skip)


@pytest.mark.parametrize("where", ["end probe", "start write"])
def test_killed_after_probing_for_strs(where: str, tmp_path: Path) -> None:
    model, ids = save_dense(tmp_path / "dense"), token_windows()
    settings = {"ratio": (0.2, 0.4), "method": "svd", "allocation": "strs", "strs_ratios": (0.2, 0.6)}
    svdllm.compress_many(model, small_recipe(**settings), tmp_path / "straight", calibration=ids)
    killed_run(model, tmp_path / "out", where, **settings)
    other = small_recipe(**settings | {"strs_ratios": (0.6,)})
    with pytest.raises(InputError, match=r"recipe: strs_ratios was \[0\.2, 0\.6\], is now \[0\.6\]"):
        svdllm.compress_many(model, other, tmp_path / "out", calibration=ids)
    results = svdllm.compress_many(model, small_recipe(**settings), tmp_path / "out", calibration=ids)
    assert ("probe" in results[0].seconds) == (where == "end probe")
    skip = tuple(f"ratio-{ratio}/svdllm/report.json" for ratio in (0.2, 0.4))
    assert digests(tmp_path / "out", skip) == digests(tmp_path / "straight", skip)


def test_killed_while_a_single_checkpoint_is_written(tmp_path: Path) -> None:
    model = save_dense(tmp_path / "dense")
    run(model, tmp_path / "straight")
    killed_run(model, tmp_path / "out", "advance", 25, ratio=0.3)
    assert (tmp_path / "out.partial" / "finished.writing").is_dir()
    run(model, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "straight")


def test_finished_blocks_are_not_decomposed_again(tmp_path: Path) -> None:
    model = save_dense(tmp_path / "dense")
    killed_run(model, tmp_path / "out", "block", 1)

    class Counting(svdllm.common.progress.Reporter):
        blocks: tuple[int, ...] = ()
        notes: tuple[str, ...] = ()

        def block_done(self, index: int, *_: object) -> None:
            self.blocks += (index,)

        def note(self, text: str) -> None:
            self.notes += (text,)

    reporter = Counting()
    recipe = small_recipe(ratio=(0.2, 0.4))
    svdllm.compress_many(model, recipe, tmp_path / "out", calibration=token_windows(), reporter=reporter)
    assert reporter.blocks == (1,)
    assert reporter.notes == ("Continuing an earlier run: 1 of 2 blocks are done.",)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ratio": 0.4}, "recipe: ratio was [0.2, 0.4], is now 0.4"),
        ({"seed": 9}, "recipe: seed was 1, is now 9"),
        ({"forms": ("packed",)}, 'recipe: forms was null, is now ["packed"]'),
        ({"method": "asvd"}, 'recipe: method was "svd-llm", is now "asvd"'),
        ({"model": 5}, "weights of the model was"),
        ({"ids": 5}, "calibration tokens was"),
    ],
)
def test_other_settings_refuse_to_go_on(change: dict[str, object], named: str, tmp_path: Path) -> None:
    model = save_dense(tmp_path / "dense")
    killed_run(model, tmp_path / "out", "block", 1)
    before = digests(tmp_path / "out.partial")
    if "model" in change:
        model = save_dense(tmp_path / "other", seed=5)
    ids = token_windows(seed=5 if "ids" in change else 0)
    settings = {key: value for key, value in change.items() if key not in ("model", "ids")}
    recipe = small_recipe(**({"ratio": (0.2, 0.4)} | settings))
    with pytest.raises(InputError, match="had other settings") as caught:
        svdllm.compress_many(model, recipe, tmp_path / "out", calibration=ids)
    assert named in str(caught.value)
    assert "--no-resume" in str(caught.value)
    assert digests(tmp_path / "out.partial") == before
    svdllm.compress_many(model, recipe, tmp_path / "out", calibration=ids, resume=False)
    assert (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


SUBJECT = sys.modules["svdllm.compression.subject"]


class Interrupting(svdllm.common.progress.Reporter):
    """Stops when the first block is done."""

    def block_done(self, *_: object) -> None:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and an unfinished run of it."""
    folder = tmp_path_factory.mktemp("interrupted")
    save_dense(folder / "dense")
    with pytest.raises(KeyboardInterrupt):
        run(folder / "dense", folder / "out", reporter=Interrupting())
    return folder


# Another value of every setting of the recipe, with what it cannot be without.
OTHERS: dict[str, dict[str, Any]] = {
    "part": {},  # there is no other that can be compressed
    "method": {"method": "asvd"},
    "asvd_alpha": {"asvd_alpha": 0.25},
    "metric": {"metric": "two-sided"},
    "gradient_samples": {"gradient_samples": 2},
    "input_only": {"input_only": ("o_proj",)},
    "shrinkage": {"shrinkage": 0.25},
    "gradient_shrinkage": {"gradient_shrinkage": 0.5},
    "ratio": {"ratio": 0.4},
    "target_params": {"ratio": None, "target_params": 20_000},
    "target_size": {"ratio": None, "target_size": 80_000},
    "factor_bits": {"ratio": None, "target_size": 80_000, "factor_bits": 8},
    "target_speedup": {"ratio": None, "target_speedup": 1.2, "allocation": "loss"},
    "speedup_tokens": {"ratio": None, "target_speedup": 1.2, "speedup_tokens": 8, "allocation": "loss"},
    "ranks": {"ratio": None, "ranks": {"q_proj": 3}},
    "allocation": {"allocation": "v2"},
    "forms": {"forms": ("packed",)},
    "runtime": {"ratio": None, "target_size": 80_000, "runtime": "transformers", "allocation": "loss"},
    "probe_share": {"probe_share": 0.25},
    "first_block_weight": {"first_block_weight": 0.5},
    "strs_ratios": {"strs_ratios": (0.5,)},
    "ignore": {"ignore": ("o_proj",)},
    "allow_partial": {"allow_partial": True},
    "overrides": {"overrides": {"o_proj": 0.5}},
    "expert_ranks": {"expert_ranks": "own"},
    "round_to": {"round_to": 2},
    "elastic": {"elastic": True},
    "calibration": {},
    "samples": {"samples": 7},
    "seqlen": {"seqlen": 15},
    "calibration_mode": {"calibration_mode": "sequential"},
    "beta": {"calibration_mode": "sequential", "beta": 0.5},
    "sequential_shrinkage": {"calibration_mode": "sequential", "sequential_shrinkage": 0.25},
    "residual_correction": {"calibration_mode": "sequential", "residual_correction": 0.5},
    "sequential_samples": {"sequential_samples": 4},
    "bias_correction": {"bias_correction": True},
    "joint_kv": {"joint_kv": True},
    "seed": {"seed": 2},
    "device": {"device": "cpu"},
    "dtype": {"dtype": "float64"},
    "batch_tokens": {"batch_tokens": 32},
}
# What else decides the bytes, and how it comes to be another.
BESIDE_THE_RECIPE = {
    "weights of the model": lambda dense, patch: save_dense(dense, seed=5),
    "config of the model": lambda dense, patch: edit(
        dense / "config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'
    ),
    "calibration tokens": lambda dense, patch: token_windows(seed=5),
    "device": lambda dense, patch: edit(
        dense.with_name("out.partial") / "analysis" / "analysis.json", '"device": "cpu"', '"device": "cuda"'
    ),
    "computed in": lambda dense, patch: patch.setattr(SUBJECT, "resolve_dtype", lambda *_: torch.float64),
    "directions of a spectrum": lambda dense, patch: patch.setattr(svdllm.Recipe, "analysed_forms", ("packed",)),
    "narrower MLPs": lambda dense, patch: patch.setattr(svdllm.Recipe, "analysed_forms", ("narrow",)),
    "svdllm version": lambda dense, patch: patch.setattr(analysis_settings, "__version__", "0.0.1"),
    "torch version": lambda dense, patch: patch.setattr(analysis_settings.torch, "__version__", "0.0.1"),
    "transformers version": lambda dense, patch: patch.setattr(analysis_settings.transformers, "__version__", "0.0.1"),
}


def edit(file: Path, old: str, new: str) -> None:
    before = file.read_text()
    assert old in before
    file.write_text(before.replace(old, new))


def test_what_decides_the_bytes_is_what_the_tests_walk_over(interrupted: Path) -> None:
    stored = json.loads((interrupted / "out.partial" / "analysis" / "analysis.json").read_text())
    assert set(OTHERS) == set(svdllm.Recipe.model_fields)
    assert set(stored) == {f"recipe: {name}" for name in OTHERS} | set(BESIDE_THE_RECIPE)


@pytest.mark.parametrize("name", sorted(OTHERS.keys() - {"part"}))
def test_an_unfinished_run_does_not_go_on_with_any_other_setting(name: str, interrupted: Path) -> None:
    text = {"ids": "python-docs"} if name == "calibration" else {}  # given tokens stand in for that of the recipe
    refused(interrupted, f"recipe: {name}", recipe=small_recipe(**OTHERS[name]), **text)


@pytest.mark.parametrize("name", BESIDE_THE_RECIPE)
def test_an_unfinished_run_does_not_go_on_with_anything_else_at_its_place(
    name: str, interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(interrupted, tmp_path / "copy")
    made = BESIDE_THE_RECIPE[name](tmp_path / "copy" / "dense", monkeypatch)
    refused(tmp_path / "copy", name, ids=made if isinstance(made, torch.Tensor) else None)


def refused(folder: Path, name: str, **changed: Any) -> None:
    with pytest.raises((InputError, KeyboardInterrupt)) as caught:  # the second would end the session
        run(folder / "dense", folder / "out", reporter=Interrupting(), **changed)
    assert re.search(rf"had other settings: (.*; )?{name} was .*, is now", str(caught.value))


def test_killed_after_the_result_had_its_name(tmp_path: Path) -> None:
    model = tiny_model("llama", 0)
    killed_run(save_dense(tmp_path / "dense"), tmp_path / "out", "end write", 2)
    (tmp_path / "out.partial" / "complete").touch()
    (tmp_path / "out.partial" / "finished").rename(tmp_path / "out")
    with pytest.raises(InputError, match="nothing is overwritten"):
        svdllm.compress_many(model, small_recipe(ratio=(0.2, 0.4)), tmp_path / "out", calibration=token_windows())
    assert not (tmp_path / "out.partial").exists()


def test_folders_that_are_not_ours_are_never_touched(tmp_path: Path) -> None:
    for name in ("out", "other.partial", "third.partial/source"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="out exists and is a folder with other things in it; nothing is overwritten"):
        run(tiny_model("llama", 0), tmp_path / "out", resume=False)
    with pytest.raises(InputError, match=r"other\.partial is in the way: it is not the work folder of a run"):
        run(tiny_model("llama", 0), tmp_path / "other", resume=False)
    with pytest.raises(InputError, match=r"third\.partial is in the way"):
        run(tiny_model("llama", 0), tmp_path / "third", resume=False)
    assert (tmp_path / "third.partial" / "source" / "thesis.tex").is_file()
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "other.partial" / "thesis.tex").read_text() == "years of work"


def test_a_finished_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    model = tiny_model("llama", 0)
    run(model, tmp_path / "out")
    before = digests(tmp_path / "out", skip=())
    with pytest.raises(InputError, match="is a finished checkpoint; nothing is overwritten"):
        run(model, tmp_path / "out", resume=False)
    assert digests(tmp_path / "out", skip=()) == before


def test_an_empty_output_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    run(tiny_model("llama", 0), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_numerical_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    model = tiny_model("llama", 0)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(3e38)
    with pytest.raises(svdllm.NumericalError, match=r"block 1 \(model\.layers\.1\).* batch 0"):
        run(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_out_of_memory_keeps_finished_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_model("llama", 0), []

    def second_fails(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        return original(*args, **kwargs)

    module = sys.modules["svdllm.compression.analyze"]
    original = module.decompose
    monkeypatch.setattr(module, "decompose", second_fails)
    with pytest.raises(svdllm.ResourceError, match=r"lower --batch-tokens \(now 4096\)"):
        run(model, tmp_path / "out")
    assert (tmp_path / "out.partial" / "analysis" / "block-0000.safetensors").is_file()
    monkeypatch.undo()
    run(model, tmp_path / "straight")
    run(model, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "straight")


def test_an_empty_output_folder_does_not_cost_the_finished_blocks(tmp_path: Path) -> None:
    model = save_dense(tmp_path / "dense")
    (tmp_path / "out").mkdir()
    killed_run(model, tmp_path / "out", "block", 1, ratio=0.3)
    done = (tmp_path / "out.partial" / "analysis" / "block-0000.safetensors").stat().st_mtime_ns
    killed_run(model, tmp_path / "out", "block", 1, ratio=0.3)
    assert (tmp_path / "out.partial" / "analysis" / "block-0000.safetensors").stat().st_mtime_ns == done
    run(model, tmp_path / "out")


def test_starting_over_removes_nothing_before_the_new_run_is_sound(tmp_path: Path) -> None:
    killed_run(save_dense(tmp_path / "dense"), tmp_path / "out", "block", 1, ratio=0.3)
    before = digests(tmp_path / "out.partial")
    with pytest.raises(InputError, match="No such model"):
        run(str(tmp_path / "mistyped"), tmp_path / "out", resume=False)
    assert digests(tmp_path / "out.partial") == before


def test_blocks_without_settings_are_not_taken_up(tmp_path: Path) -> None:
    """A kill while the work folder is removed may leave blocks of settings that nobody knows any more."""
    model = save_dense(tmp_path / "dense")
    killed_run(model, tmp_path / "out", "block", 2, ratio=0.3)
    (tmp_path / "out.partial" / "analysis" / "analysis.json").unlink()
    ids = token_windows(seed=9)
    run(model, tmp_path / "out", ids=ids)
    run(model, tmp_path / "straight", ids=ids)
    assert digests(tmp_path / "out") == digests(tmp_path / "straight")


def test_text_of_another_tokenizer_is_another_run(tmp_path: Path, tokenizer) -> None:
    from tokenizers_local import byte_tokenizer

    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    fingerprints = [
        svdllm.data.calibration_windows(str(text), other, samples=4, seqlen=8, seed=0).fingerprint
        for other in (tokenizer, byte_tokenizer(vocab_size=270))
    ]
    assert fingerprints[0] != fingerprints[1]
