"""The method end to end on tiny models of many families."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import svdllm
from families import FAMILIES, dense_weight, linear_targets, stored_ranks, tiny_model
from runs import TEXT, digests, ranks_in, run, save_dense, small_recipe, token_windows
from svdllm.compression.collect import collect_statistics
from svdllm.compression.math.metrics import METHODS
from svdllm.compression.parts import Part
from svdllm.models.discover import discover
from svdllm.models.linears import is_linear
from svdllm.models.open import open_source
from svdllm.models.skeleton import build_skeleton
from svdllm.models.walk import Walk


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_gives_the_dense_logits(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, 0)
    model.save_pretrained(tmp_path / "dense")
    ids = token_windows()
    recipe = svdllm.Recipe(ranks={".": "full"}, samples=8, seqlen=16)
    result = run(tmp_path / "dense", tmp_path / "out", ids=ids, recipe=recipe)
    with torch.no_grad():
        dense, compressed = model(input_ids=ids).logits, result.load()(input_ids=ids).logits
    torch.testing.assert_close(compressed, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_compresses_and_accounts_exactly(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = run(model, tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.num_parameters() == result.plan.params < model.num_parameters()
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == result.plan.file_bytes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {linear.name for linear in result.linears} == set(linear_targets(model))
    svdllm.verify(tmp_path / "out", "cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_grams_are_those_of_whole_model_hooks(family: str) -> None:
    model, ids = tiny_model(family, 0), token_windows()
    whole: dict[str, torch.Tensor] = {}

    def hook(name: str):
        def add(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            tokens = args[0].reshape(-1, args[0].shape[-1]).double()
            whole[name] = whole.get(name, 0) + tokens.mT @ tokens

        return add

    handles = [
        module.register_forward_pre_hook(hook(name)) for name, module in model.named_modules() if is_linear(module)
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    source = open_source(model)
    skeleton = build_skeleton(source.config)
    structure = discover(skeleton)
    walk = Walk(source.weights, skeleton, structure, ids, torch.device("cpu"), torch.float32, batch_tokens=48)
    compared = 0
    for block in walk.blocks():
        targets = structure.block_targets(block.index)
        for name, statistic in collect_statistics(block, Part(targets=targets), METHODS["svd-llm"]).items():
            scale = whole[name].abs().max()
            torch.testing.assert_close(statistic.value() / scale, whole[name] / scale, rtol=1e-5, atol=1e-6)
            compared += 1
    assert compared == len(structure.targets)
    with torch.no_grad():
        torch.testing.assert_close(walk.logits(), model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_factors_are_the_papers(tmp_path: Path) -> None:
    """Against Algorithm 1 as printed: Cholesky of the Gram, SVD of W S, inverse."""
    model, ids = tiny_model("llama", 0), token_windows(64, 32)
    name = "model.layers.0.mlp.up_proj"
    inputs = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0].reshape(-1, 32)))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    result = run(model, tmp_path / "out", ids=ids, recipe=small_recipe(samples=64, seqlen=32, ratio=0.4))
    tokens = torch.cat(inputs).double()
    weight = dense_weight(model.get_submodule(name)).double()
    root = torch.linalg.cholesky(tokens.mT @ tokens)
    u, s, vh = torch.linalg.svd(weight @ root)
    rank = ranks_in(result.plan.forms)[name]
    expected = (u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(root)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    found = stored[f"{name}.svd_u.weight"].double() @ stored[f"{name}.svd_v.weight"].double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    record = next(linear for linear in result.linears if linear.name == name)
    assert record.loss == pytest.approx(float(s[rank:].square().sum().sqrt()), rel=1e-4)
    assert record.loss == pytest.approx(float(torch.linalg.norm((weight - found) @ tokens.mT)), rel=1e-4)


def test_reload_in_a_clean_process_is_bit_equal(tmp_path: Path) -> None:
    result = run(tiny_model("llama", 0), tmp_path / "out")
    ids = token_windows(2)
    with torch.no_grad():
        expected = result.load()(input_ids=ids).logits
    script = (
        "import sys, torch, svdllm; from transformers import AutoModelForCausalLM\n"
        "from safetensors.torch import save_file\n"
        "g = torch.Generator().manual_seed(0); ids = torch.randint(0, 128, (2, 16), generator=g)\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "with torch.no_grad(): save_file({'logits': model(input_ids=ids).logits.contiguous()}, sys.argv[2])\n"
    )
    file = tmp_path / "logits.safetensors"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "out"), str(file)], check=True, capture_output=True)
    assert torch.equal(load_file(file)["logits"], expected)


def test_same_seed_same_bytes_and_the_global_generator_is_left_alone(tmp_path: Path, tokenizer) -> None:
    dense = save_dense(tmp_path / "dense", tokenizer=tokenizer)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    state = torch.get_rng_state()
    folders = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folders[name] = tmp_path / name
        svdllm.compress(dense, small_recipe(calibration=str(text), seed=seed), folders[name])
    assert torch.equal(torch.get_rng_state(), state)
    assert digests(folders["a"]) == digests(folders["b"])
    assert digests(folders["a"])["model.safetensors"] != digests(folders["c"])["model.safetensors"]
    assert AutoTokenizer.from_pretrained(folders["a"])("the fox").input_ids == tokenizer("the fox").input_ids
    assert digests(dense)["tokenizer.json"] == digests(folders["a"])["tokenizer.json"]


def test_several_ratios_are_the_same_as_runs_of_their_own(tmp_path: Path) -> None:
    model, ids = tiny_model("gpt2", 0), token_windows()
    results = svdllm.compress_many(model, small_recipe(ratio=(0.2, 0.5)), tmp_path / "both", calibration=ids)
    assert [result.output_dir.name for result in results] == ["ratio-0.2", "ratio-0.5"]
    for ratio in (0.2, 0.5):
        run(model, tmp_path / str(ratio), ids=ids, recipe=small_recipe(ratio=ratio))
        assert digests(tmp_path / str(ratio)) == digests(tmp_path / "both" / f"ratio-{ratio}")


def test_hidden_states_on_disk_give_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_model("llama", 0)
    run(model, tmp_path / "ram")
    on_disk = run(model, tmp_path / "disk", hidden_states_limit=0)
    assert on_disk.plan.needs.hidden_states_on_disk
    assert digests(tmp_path / "ram") == digests(tmp_path / "disk")
    assert not (tmp_path / "disk.partial").exists()


def test_source_dtype_is_kept_on_disk(tmp_path: Path) -> None:
    model = tiny_model("llama", 0).to(torch.bfloat16)
    result = run(model, tmp_path / "out")
    assert result.plan.needs.compute_dtype == "float32"
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert result.load(dtype="auto").dtype == torch.bfloat16


def test_shards_in_and_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", 0)
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 1
    run(model, tmp_path / "one")
    monkeypatch.setattr("svdllm.checkpoint.shards.SHARD_BYTES", 20_000)
    run(tmp_path / "dense", tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    ids = token_windows(2)
    with torch.no_grad():
        one, many = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name)(input_ids=ids).logits for name in ("one", "many")
        )
    assert torch.equal(one, many)
    svdllm.verify(tmp_path / "many", "cpu")


def test_ignored_and_overridden_linears(tmp_path: Path) -> None:
    model = tiny_model("llama", 0)
    recipe = small_recipe(ignore=["q_proj"], overrides={r"layers\.0\.mlp": 0.0, "down_proj": 0.6}, round_to=4)
    result = run(model, tmp_path / "out", recipe=recipe)
    modules = dict(result.load().named_modules())
    for name, linear in linear_targets(model).items():
        dense = "q_proj" in name or "layers.0.mlp" in name
        assert is_linear(modules[name]) == dense
        if not dense:
            assert modules[name].svd_v.out_features % 4 == 0
            assert modules[name].svd_v.out_features == ranks_in(result.plan.forms)[name]
        else:
            assert torch.equal(dense_weight(modules[name]), dense_weight(linear))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ranks = ranks_in(result.plan.forms)
    assert stored_ranks(config) == ranks
    assert ranks["model.layers.1.mlp.down_proj"] < ranks["model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_says_so(method: str, tmp_path: Path) -> None:
    result = run(tiny_model("llama", 0), tmp_path / "out", recipe=small_recipe(method=method))
    report = json.loads((tmp_path / "out" / "svdllm" / "report.json").read_text())
    assert report["method"] == result.plan.recipe.method == method
    assert all(0 < row["kept_energy"] <= 1 for row in report["linears"])
    assert all(row["seconds"] > 0 for row in report["linears"])
    assert (report["source"]["calibration"] is None) == (method == "svd")


def test_too_few_tokens_warn_and_stay_finite(tmp_path: Path) -> None:
    reporter = svdllm.common.progress.Reporter()
    result = run(
        tiny_model("llama", 0),
        tmp_path / "out",
        recipe=small_recipe(samples=2, seqlen=8),
        ids=token_windows(2, 8),
        reporter=reporter,
    )
    assert any("Only 16 calibration tokens" in warning and "48" in warning for warning in result.warnings)
    assert torch.isfinite(result.load()(input_ids=token_windows(1)).logits).all()


def test_progress_is_told_and_the_times_are_recorded(tmp_path: Path) -> None:
    class Listening(svdllm.common.progress.Reporter):
        blocks: list[int]
        steps: list[tuple[int, int]]

        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.steps = [], []

        def block_done(self, index: int, num_blocks: int, forward_seconds: float, decompose_seconds: float) -> None:
            self.blocks.append(index)

        def advance(self, done: int, steps: int) -> None:
            self.steps.append((done, steps))

    reporter = Listening()
    result = run(tiny_model("llama", 0), tmp_path / "out", reporter=reporter)
    assert reporter.blocks == [0, 1]
    assert all(0 < done <= steps for done, steps in reporter.steps)
    assert {"plan", "open", "check weights", "analyze", "write"} <= set(result.seconds)


def test_card_and_recipe_repeat_the_run(tmp_path: Path, tokenizer) -> None:
    dense = save_dense(tmp_path / "dense", tokenizer=tokenizer)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    svdllm.compress(dense, small_recipe(calibration=str(text)), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers")
    assert "dense, compressed by 3" in card
    settings = svdllm.compression.recipe_files.load_settings(tmp_path / "out" / "svdllm" / "recipe.yaml")
    svdllm.compress(dense, svdllm.compression.recipe_files.make_recipe(settings), tmp_path / "again")
    assert digests(tmp_path / "out") == digests(tmp_path / "again")


@pytest.mark.parametrize("budget", [{"target_params": 14_000}, {"target_size": 60_000}])
def test_whole_model_budgets_are_met(budget: dict[str, int], tmp_path: Path) -> None:
    result = run(tiny_model("llama", 0), tmp_path / "out", recipe=small_recipe(**budget))
    (unit, limit), steps = next(iter(budget.items())), [t.in_features + t.out_features for t in result.plan.targets]
    spent = (
        result.load().num_parameters()
        if unit == "target_params"
        else (tmp_path / "out" / "model.safetensors").stat().st_size
    )
    assert spent <= limit
    slack = min(steps) if unit == "target_params" else 4 * min(steps) + 64
    assert limit - spent < slack


def test_export_multiplies_out(tmp_path: Path) -> None:
    for family in ("llama", "gpt2"):
        model = tiny_model(family, 0)
        result = run(model, tmp_path / family)
        svdllm.export_dense(tmp_path / family, tmp_path / f"{family}-dense")
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / f"{family}-dense")
        assert type(dense) is type(model)
        assert dense.num_parameters() == model.num_parameters()
        ids = token_windows(2)
        with torch.no_grad():
            torch.testing.assert_close(
                dense(input_ids=ids).logits, result.load()(input_ids=ids).logits, rtol=1e-4, atol=1e-5
            )


def test_a_tied_tensor_that_is_stored_twice_counts_once(tmp_path: Path) -> None:
    model = tiny_model("llama", 0)
    model.save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, metadata={"format": "pt"}
    )
    result = run(tmp_path / "dense", tmp_path / "out")
    assert result.plan.dense_params == model.num_parameters()
    svdllm.verify(tmp_path / "out", "cpu")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(svdllm.UnsupportedModelError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight"):
        run(tmp_path / "dense", tmp_path / "again")
    head_only = {name: tensor for name, tensor in tensors.items() if name != "model.embed_tokens.weight"}
    save_file(head_only | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, file, metadata={"format": "pt"})
    run(tmp_path / "dense", tmp_path / "head")
    assert digests(tmp_path / "head")["model.safetensors"] == digests(tmp_path / "out")["model.safetensors"]


def test_models_in_memory_that_are_no_causal_lm_of_their_config(tmp_path: Path) -> None:
    with pytest.raises(svdllm.CheckpointError, match=r"LlamaModel: \d+ tensors of LlamaForCausalLM are missing"):
        run(tiny_model("llama", 0).model, tmp_path / "out")
    with pytest.raises(svdllm.InputError, match="found Linear"):
        run(nn.Linear(2, 2), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_generation_settings_of_a_model_in_memory_are_kept_as_they_are(tmp_path: Path) -> None:
    model = tiny_model("llama", 0)
    model.generation_config.temperature = 0.7  # with do_sample=False, which save_pretrained refuses
    run(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.7
