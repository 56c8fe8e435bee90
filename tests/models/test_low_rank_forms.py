"""Models with every form of a linear: exact, stored and loaded whole, and refused where something is wrong."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from families import tiny_config, tiny_model, tiny_tokens
from forms import MLPS, model_in_forms
from svdllm import load_model
from svdllm.common.errors import CheckpointError
from svdllm.models.low_rank import (
    LowRankLinear,
    PackedLinear,
    family_classes,
    low_rank_config,
    swap_linears,
    write_hashes,
)
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.low_rank.lowrank import check_tensor_parallel

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
PACKED = {"form": "packed", "rank": 5, "side": "rows"}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(tiny_tokens()).logits


def saved(folder: Path, family: str = "llama", **how: Any) -> Any:
    model = model_in_forms(family)[1]
    model.save_pretrained(folder, **how)
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# every family


@pytest.mark.parametrize("family", MLPS)
def test_family_round_trip(family: str, tmp_path: Path) -> None:
    dense, model = model_in_forms(family)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)
    assert model.num_parameters() < dense.num_parameters()
    assert {module.side for module in model.modules() if isinstance(module, PackedLinear)} == {"rows", "columns"}

    model.save_pretrained(tmp_path / "a")
    stored = load_file(tmp_path / "a/model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if name.endswith(".order")} == {torch.int32}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")

    bare = AutoModel.from_pretrained(tmp_path / "a")
    body = model.base_model(tiny_tokens()).last_hidden_state
    assert torch.equal(bare(tiny_tokens()).last_hidden_state, body)


def test_dtype_device_map_shards_and_copies(tmp_path: Path) -> None:
    model = saved(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="auto")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.get_submodule(Q).order.dtype == torch.int32
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))
        assert type(twin.model.layers[0].self_attn) is type(model.model.layers[0].self_attn)
        assert torch.equal(logits(twin.bfloat16()), logits(half))


def test_generation_compilation_and_more_tokens() -> None:
    dense, model = model_in_forms("llama")
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(tiny_tokens(), **how), dense.generate(tiny_tokens(), **how))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-5, atol=1e-5)
    model.resize_token_embeddings(136)
    torch.testing.assert_close(logits(model)[..., :128], logits(dense), rtol=1e-5, atol=1e-5)


def test_every_weight_is_trained_and_checkpointing_changes_nothing() -> None:
    model = model_in_forms("qwen2")[1].train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(tiny_tokens(), labels=tiny_tokens()).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in gradients[0].values() if grad.ndim > 1)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_new_model_has_random_weights_and_valid_orders() -> None:
    config = model_in_forms("gpt2")[1].config
    model = AutoModelForCausalLM.from_config(config).eval()
    assert bool(torch.isfinite(logits(model)).all())
    linear = model.transformer.h[0].mlp.c_fc
    assert (type(linear).__name__, linear.nf, linear.nx, linear.weight.shape) == ("Conv1D", 30, 32, (32, 30))
    with torch.device("meta"):
        assert {p.device.type for p in AutoModelForCausalLM.from_config(config).parameters()} == {"meta"}


def test_a_first_factor_is_shared_by_linears_packed_by_columns(tmp_path: Path) -> None:
    k, v = (f"model.layers.0.self_attn.{name}_proj" for name in "kv")
    packed = PACKED | {"side": "columns"}
    settings = {"format_version": 2, "base_model_type": "llama", "forms": {k: packed, v: packed}}
    model = family_classes("llama").causal_lm(
        low_rank_config(tiny_config("llama"), settings | {"shared_factors": {v: k}})
    )
    model.eval().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {f"{k}.svd_v.weight", f"{k}.order", f"{v}.order"} <= set(stored)
    assert f"{v}.svd_v.weight" not in stored
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_submodule(k).svd_v is loaded.get_submodule(v).svd_v
    assert torch.equal(logits(loaded), logits(model))


def test_biases_of_corrected_linears() -> None:
    """Rows that are kept are exact; everything else is approximated."""
    model = tiny_model("llama")
    forms = {Q: PACKED, DOWN: {"form": "narrow", "in_features": 9}}
    forms |= {DOWN.replace("down", name): {"form": "narrow", "out_features": 9} for name in ("gate", "up")}
    swap_linears(model, forms, add_biases=True)
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert biases == {f"{Q}.bias", f"{DOWN}.bias"}


def test_low_rank_inside_a_narrower_mlp() -> None:
    model = tiny_model("llama")
    sizes = {"gate": {"out_features": 20}, "up": {"out_features": 20}, "down": {"in_features": 20}}
    swap_linears(model, {DOWN.replace("down", name): PACKED | size for name, size in sizes.items()})
    mlp = model.model.layers[0].mlp
    assert [tuple(linear.svd_v.weight.shape) for linear in (mlp.gate_proj, mlp.down_proj)] == [(5, 32), (5, 20)]
    assert mlp.up_proj.svd_u.weight.shape == (15, 5)
    swap_linears(tiny_model("llama"), {DOWN: {"form": "pair", "rank": 5, "in_features": 20}})
    assert bool(torch.isfinite(logits(model)).all())


# what is wrong


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        ([], "forms: expected a mapping"),
        ({Q: "pair"}, f"forms: {Q}: expected a form of pair, packed, narrow, corrected, found pair"),
        ({Q: {"form": "sparse"}}, "expected a form of pair, packed, narrow, corrected, found"),
        ({Q: {"form": "pair"}}, "pair lacks rank"),
        ({Q: {"form": "packed", "rank": 4}}, "packed lacks side"),
        ({Q: PACKED | {"side": "left"}}, "expected the side rows or columns, found 'left'"),
        ({Q: {"form": "narrow", "rank": 4, "in_features": 5}}, "narrow has no rank"),
        ({Q: {"form": "narrow"}}, "narrow lacks in_features or out_features"),
        ({Q: PACKED | {"rank": 0, "in_features": True}}, "expected positive integers, found {'in_features': True, 'r"),
        ({f"{Q}{i}": {"form": "pair"} for i in range(10)}, "and 2 more"),
    ],
)
def test_entries_that_cannot_be_read(forms: Any, message: str) -> None:
    settings = {"format_version": 2, "base_model_type": "llama", "forms": forms}
    with pytest.raises(ValueError) as raised:
        low_rank_config(tiny_config("llama"), settings)
    assert message in str(raised.value)
    with pytest.raises(CheckpointError) as refused:
        LowRankInfo.of({"svdllm": settings}, "this model")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("entries", "shared"),
    [
        ([PACKED, PACKED], 1),  # pivot rows belong to one linear
        ([PACKED | {"side": "columns"}, {"form": "pair", "rank": 5}], 1),
        ([{"form": "narrow", "out_features": 5}] * 2, 1),
        ([{"form": "pair", "rank": 5}, {"form": "pair", "rank": 5, "in_features": 20}], 1),
    ],
)
def test_first_factors_that_cannot_be_shared(entries: list[dict[str, Any]], shared: int) -> None:
    settings = {"format_version": 2, "base_model_type": "llama", "forms": dict(zip("ab", entries, strict=True))}
    with pytest.raises(ValueError, match=r"shared_factors: b cannot have the first factor of a: expected two pairs"):
        low_rank_config(tiny_config("llama"), settings | {"shared_factors": {"b": "a"}})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (PACKED | {"rank": 32}, f"{Q}: expected a packed rank below 32, the smaller of inputs and outputs, found 32"),
        (PACKED | {"rank": 20, "out_features": 20}, "expected a packed rank below 20"),
        ({"form": "narrow", "in_features": 33}, "expected at most 32 inputs and 32 outputs, found 33 and 32"),
    ],
)
def test_sizes_that_do_not_fit(entry: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        swap_linears(model, {Q: entry})
    assert type(model.get_submodule(Q)) is nn.Linear


@pytest.mark.parametrize("order", [[0] * 32, [*range(31), 40], [*range(31), -1]])
def test_an_order_that_is_no_permutation(order: list[int], tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{Q}.order"] = torch.tensor(order, dtype=torch.int32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    write_hashes(tmp_path)
    message = f"order of {Q} is not a permutation of the features. Fetch or write"
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_version_2_is_refused_by_the_code_of_version_1(tmp_path: Path) -> None:
    """The code of a checkpoint that svdllm 0.1 wrote."""
    old = Path(__file__).parents[1] / "checkpoints" / "bias-corrected" / "configuration_svdllm_llama.py"
    spec = importlib.util.spec_from_file_location("configuration_of_version_1", old)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    saved(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match=r"reads checkpoint format 1, found format_version=2\. Upgrade with `pip"):
        module.SvdllmLlamaConfig(**settings)
    assert AutoConfig.from_pretrained(tmp_path).svdllm == settings["svdllm"]


# tensor parallelism


def test_packed_linears_are_not_split_between_processes() -> None:
    model = model_in_forms("llama")[1]
    check_tensor_parallel(model, 1)
    message = r"cannot be split between 2 processes, and this model has 6: .*svdllm export MODEL -o OUT --format pairs"
    with pytest.raises(ValueError, match=message):
        check_tensor_parallel(model, 2)
    with pytest.raises(ValueError, match=message):
        type(model).maybe_distribute_model(model, SimpleNamespace(tp_size=2), None)


def test_a_width_that_the_processes_do_not_divide() -> None:
    forms = {DOWN: {"form": "narrow", "in_features": 30}}
    forms |= {DOWN.replace("down", name): {"form": "narrow", "out_features": 30} for name in ("gate", "up")}
    settings = {"format_version": 2, "base_model_type": "llama", "forms": forms}
    model = family_classes("llama").causal_lm(low_rank_config(tiny_config("llama"), settings))
    check_tensor_parallel(model, 2)
    with pytest.raises(ValueError, match=rf"between 4 processes .* not in {DOWN} \(30\), .*--round-to"):
        check_tensor_parallel(model, 4)


def test_pairs_beside_packed_linears_keep_their_plan() -> None:
    forms = {Q: {"form": "pair", "rank": 5}, Q.replace("q_p", "k_p"): PACKED}
    settings = {"format_version": 2, "base_model_type": "llama", "forms": forms}
    config = low_rank_config(tiny_config("llama"), settings)
    assert config.base_model_tp_plan["layers.*.self_attn.q_proj.svd_u"] == "colwise"
    assert not any("k_proj.svd" in rule for rule in config.base_model_tp_plan)
    model = family_classes("llama").causal_lm(config)
    assert isinstance(model.get_submodule(Q), LowRankLinear)
