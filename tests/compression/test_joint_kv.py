"""One first factor for keys and values: the optimum of both together, kept once in files, parameters and cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import svdllm
from analysed import analysed, grams_by_autograd
from families import tiny_model, tiny_tokens
from generation import WAYS, assert_same, generated, in_parts
from reference import optimal_outputs
from runs import TEXT, digests, ranks_in, run, small_recipe, token_windows
from svdllm import UnsupportedModelError, fuse_factors, load_model, recover
from svdllm.checkpoint.verify import verify
from svdllm.inference.latent_cache import cache_bytes, cache_size, use_latent_cache, use_ordinary_cache
from svdllm.models.discover import discover
from svdllm.models.joint_keys_and_values import with_joint_keys_and_values
from svdllm.models.skeleton import build_skeleton
from svdllm.recovery.settings import make_recovery

FAMILIES = ["llama", "qwen2", "qwen3", "gemma3_text", "opt", "cohere", "hunyuan_v1_dense"]
PAIRS = [("model.layers.0.self_attn", 0), ("model.layers.1.self_attn", 1)]


def joint(model: Any, folder: Path, **settings: Any) -> Any:
    return run(model, folder, recipe=small_recipe(joint_kv=True, **settings), ids=token_windows())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, dense: Path) -> Path:
    return joint(dense, tmp_path_factory.mktemp("out") / "joint").output_dir


def inputs_of(model: Any, names: list[str], ids: Tensor) -> dict[str, Tensor]:
    """What linears read (in x tokens), float64."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, args: seen.update({name: args[0].detach().double().flatten(0, -2).mT})

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_outputs_are_the_best_of_their_rank_for_both_together(tmp_path: Path) -> None:
    """Keys and values count for as much as each other: the sum of their relative errors is the least there is."""
    model, ids = tiny_model("qwen2"), token_windows()
    compressed = joint(model, tmp_path / "out").load()
    seen = inputs_of(model, [f"{parent}.k_proj" for parent, _ in PAIRS], ids)
    for parent, block in PAIRS:
        x_IT = seen[f"{parent}.k_proj"]
        weights = [model.get_submodule(f"{parent}.{leaf}").weight.detach().double() for leaf in ("k_proj", "v_proj")]
        scaled = torch.cat([weight / (weight @ x_IT).norm() for weight in weights])
        attention = compressed.model.layers[block].self_attn
        rank = attention.k_proj.svd_v.out_features
        best = scaled @ x_IT - optimal_outputs(scaled, x_IT, rank)
        errors = 0.0
        for weight, linear in zip(weights, (attention.k_proj, attention.v_proj), strict=True):
            product = linear.svd_u.weight.detach().double() @ linear.svd_v.weight.detach().double()
            errors += float(((weight - product) @ x_IT).norm() ** 2 / (weight @ x_IT).norm() ** 2)
        assert errors == pytest.approx(float(best.norm() ** 2), rel=1e-4)
        assert errors > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_is_the_dense_model(family: str, tmp_path: Path) -> None:
    """With every mode of calibration, biases included."""
    model, ids = tiny_model(family), tiny_tokens()
    for number, settings in enumerate(({}, {"calibration_mode": "sequential", "beta": 0.0}, {"bias_correction": True})):
        ranks = {"(k|v)_proj": "full"}
        result = joint(model, tmp_path / str(number), ranks=ranks, **settings)
        with torch.no_grad():
            assert_same(result.load()(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_latent_is_stored_and_counted_once(dense: Path, checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    config = json.loads((checkpoint / "config.json").read_text())["svdllm"]
    assert config["shared_factors"] == {f"{parent}.v_proj": f"{parent}.k_proj" for parent, _ in PAIRS}
    for parent, _ in PAIRS:
        # keys and values of 2 heads of width 8: floor(0.7 * 32 * 32 / (32 + 32)) for the 32 rows of both
        assert tensors[f"{parent}.k_proj.svd_v.weight"].shape == (11, 32)
        assert tensors[f"{parent}.v_proj.svd_u.weight"].shape == (16, 11)
        assert f"{parent}.v_proj.svd_v.weight" not in tensors
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.num_parameters() == sum(tensor.numel() for tensor in tensors.values())
    report = json.loads((checkpoint / "svdllm" / "report.json").read_text())
    assert report["params"] == model.num_parameters()
    assert report["file_bytes"] == (checkpoint / "model.safetensors").stat().st_size
    assert 0 <= report["achieved_ratio"] - 0.3 < 0.02
    verify(checkpoint)
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    attention = load_model(tmp_path / "again").model.layers[1].self_attn
    assert attention.k_proj.svd_v is attention.v_proj.svd_v
    assert model.state_dict().keys() - {"lm_head.weight"} == tensors.keys()
    model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*k_proj\.svd_v"):
        model.load_state_dict({name: t for name, t in model.state_dict().items() if "k_proj.svd_v" not in name})


def test_multiplied_out_it_is_a_plain_model(checkpoint: Path, tmp_path: Path) -> None:
    svdllm.export_dense(checkpoint, tmp_path / "plain")
    with torch.no_grad():
        found = load_model(tmp_path / "plain")(input_ids=tiny_tokens()).logits
        assert_same(found, load_model(checkpoint)(input_ids=tiny_tokens()).logits)


def latent(checkpoint: Path) -> Any:
    model = load_model(checkpoint).eval()
    assert use_latent_cache(model) == 2
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("static", [False, True])
def test_the_cache_keeps_one_latent(family: str, static: bool, tmp_path: Path) -> None:
    out = joint(tiny_model(family), tmp_path / "out").output_dir
    model, ids, lengths = latent(out), tiny_tokens(2, 26), [7, 1, 1, 2, 14, 1]
    cache: Any = StaticCache(config=model.config, max_cache_len=26) if static else DynamicCache(config=model.config)
    assert_same(in_parts(model, ids, lengths, cache), in_parts(load_model(out).eval(), ids, lengths))
    rank = model.get_decoder().layers[0].self_attn.k_proj.svd_v.out_features
    if not any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        assert cache_bytes(cache) == 2 * 2 * 26 * rank * 4
    assert cache_size(model.config, torch.float32).latent == 2 * rank * 4


@pytest.mark.parametrize("way", WAYS)
def test_generates_the_same(way: str, checkpoint: Path) -> None:
    ordinary, found = generated(load_model(checkpoint), **WAYS[way]), generated(latent(checkpoint), **WAYS[way])
    assert torch.equal(found.sequences, ordinary.sequences)
    assert_same(found.logits, ordinary.logits)


def test_values_alone_are_worth_it_below_their_own_width(checkpoint: Path) -> None:
    model, cache = load_model(checkpoint).eval(), DynamicCache()
    assert use_latent_cache(model, keys=False) == 2
    assert_same(in_parts(model, tiny_tokens(), [5, 1, 6], cache), in_parts(load_model(checkpoint), tiny_tokens(), [12]))
    assert cache_bytes(cache) == 2 * 2 * 12 * (16 + 11) * 4


def test_fused_the_latent_is_computed_once(checkpoint: Path) -> None:
    model = load_model(checkpoint).eval()
    expected, names = in_parts(model, tiny_tokens(), [12]), list(model.state_dict())
    assert fuse_factors(model) == 4
    attention = model.model.layers[0].self_attn
    (product,) = attention.q_proj.shared._products
    assert product.weight_OI.shape == (16 + 16, 32)  # ranks of q and of both, filled up to 16
    assert_same(in_parts(model, tiny_tokens(), [12]), expected)
    assert use_latent_cache(model) == 2
    assert_same(in_parts(model, tiny_tokens(), [5, 1, 1, 5]), expected)
    assert use_ordinary_cache(model) == 2
    assert_same(in_parts(model, tiny_tokens(), [5, 1, 1, 5]), expected)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("input_only", [(), ("k_proj",)])
def test_with_gradients_each_has_its_own_metric_and_weight(input_only: tuple[str, ...], tmp_path: Path) -> None:
    """``G`` of both is block-diagonal, in proportion to their gradients; one of inputs alone keeps the proportion."""
    ids = token_windows(samples=4, seqlen=12)
    settings = {"metric": "two-sided", "gradient_samples": 4, "gradient_shrinkage": 0.3, "input_only": input_only}
    found = analysed(tiny_model("llama"), tmp_path, ids, joint_kv=True, **settings)
    for target in found.structure.targets:
        if not target.parts:
            continue
        oracle = grams_by_autograd(found.model, list(target.linears), ids, ids)
        blocks = []
        for name, (_, g_OO) in oracle.items():
            identity = g_OO.diagonal().mean() * torch.eye(len(g_OO), dtype=g_OO.dtype)
            share = 1.0 if name.endswith(input_only or ("-",)) else 0.3
            blocks.append((1 - share) * g_OO + share * identity)
        left_OO = torch.linalg.cholesky(torch.block_diag(*blocks)).mT
        c_II = oracle[target.linears[0]][0]
        weights = [found.model.get_submodule(name).weight.detach() for name in target.linears]
        weighted_OI = left_OO @ torch.cat(weights)
        expected = torch.linalg.eigvalsh(weighted_OI @ c_II @ weighted_OI.mT).flip(0)
        energies = found.analysis.energies(target)
        torch.testing.assert_close(energies / energies[0], expected / expected[0], rtol=1e-5, atol=1e-6)


def test_the_budget_is_spread_by_what_both_do(tmp_path: Path) -> None:
    """With probes, gradients and a second walk; one rank or none for both."""
    result = joint(
        tiny_model("llama"),
        tmp_path / "out",
        allocation="loss",
        metric="two-sided",
        gradient_samples=2,
        calibration_mode="sequential",
        overrides={"0.*v_proj": 0.5},
    )
    ranks = ranks_in(result.plan.forms)
    assert ranks["model.layers.0.self_attn.k_proj+v_proj"] == 8  # half of 32 * 32 weights, at 64 a rank
    assert result.plan.achieved_ratio >= 0.3 - 1e-9
    verify(result.output_dir)


def test_a_slice_is_the_run_at_its_ratio(dense: Path, tmp_path: Path) -> None:
    joint(dense, tmp_path / "elastic", elastic=True)
    joint(dense, tmp_path / "direct", ratio=0.5, forms=("pair",))
    svdllm.slice_checkpoint(tmp_path / "elastic", 0.5, tmp_path / "sliced")
    assert digests(tmp_path / "sliced") == digests(tmp_path / "direct")


@pytest.mark.parametrize("method", ["sequential-lora", "distill", "blockwise"])
def test_what_is_trained_stays_shared(method: str, dense: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    settings = {"data": str(tmp_path / "text.txt"), "seqlen": 16, "batch": 4, "lr": 1e-2, "teacher": str(dense)}
    if method != "blockwise":
        settings["steps"] = 4
    if method == "sequential-lora":
        del settings["teacher"]
    recovered = recover(checkpoint, tmp_path / "out", make_recovery({"methods": (method,)} | settings)).output_dir
    before, after = load_file(checkpoint / "model.safetensors"), load_file(recovered / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items() if ".svd_" in name)
    verify(recovered)
    attention = load_model(recovered).model.layers[0].self_attn
    assert attention.k_proj.svd_v is attention.v_proj.svd_v


def test_in_few_bits_it_is_still_one(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    result = svdllm.quantize(checkpoint, tmp_path / "out", format="torchao")
    assert len(result.linears) == 2 * 13  # 7 linears a block, of which two have one first factor
    model = load_model(tmp_path / "out").eval()
    attention = model.model.layers[0].self_attn
    assert attention.k_proj.svd_v is attention.v_proj.svd_v
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert not any("v_proj.svd_v" in name for name in names)
    assert "model.layers.0.self_attn.k_proj.svd_v._weight_qdata" in names
    verify(tmp_path / "out")


def test_who_is_joined() -> None:
    skeleton = build_skeleton(tiny_model("llama").config)
    structure = with_joint_keys_and_values(discover(skeleton))
    names = [target.name.removeprefix("model.layers.0.") for target in structure.block_targets(0)]
    assert names[:3] == ["self_attn.q_proj", "self_attn.k_proj+v_proj", "self_attn.o_proj"]
    assert structure.num_target_params == discover(skeleton).num_target_params
    without_q = with_joint_keys_and_values(discover(skeleton, ("q_proj",)))
    assert {t.group for t in without_q.block_targets(0) if t.parts} == {"model.layers.0.self_attn.k_proj+v_proj"}
    one_apart = with_joint_keys_and_values(discover(skeleton, ("0.self_attn.v_proj",)))
    assert [t.name for t in one_apart.targets if t.parts] == ["model.layers.1.self_attn.k_proj+v_proj"]


@pytest.mark.parametrize(("family", "ignore"), [("gpt2", ()), ("phi3", ()), ("llama", ("v_proj",))])
def test_nothing_to_join_is_refused(family: str, ignore: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"--joint-kv needs a layer whose k_proj and v_proj .* Leave out --joint-kv"
    ):
        joint(tiny_model(family), tmp_path / "out", ignore=ignore)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "shared",
    [
        ["v_proj"],
        {"model.layers.0.self_attn.v_proj": "model.layers.0.mlp.gate_proj"},
        {"model.layers.0.self_attn.v_proj": "model.layers.7.self_attn.k_proj"},
        {"model.layers.0.self_attn.v_proj": "model.layers.0.self_attn.v_proj"},
    ],
)
def test_a_config_that_shares_what_cannot_be_is_refused(shared: Any, checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["svdllm"]["shared_factors"] = shared
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="shared_factors"):
        svdllm.models.open.load_config(tmp_path, "the model")
