"""Models that store buffers: they are in the files, and no parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import svdllm
from runs import run, small_recipe
from svdllm.checkpoint.tensors import buffer_names
from svdllm.models.open import open_source
from svdllm.models.skeleton import build_skeleton
from svdllm.models.weights import survey

COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
WITH_BUFFERS: dict[str, dict[str, Any]] = {
    "apertus": {},
    "gemma4_text": {
        "head_dim": 8,
        "global_head_dim": 8,
        "sliding_window": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 128,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
    },
}


def model_with_buffers(family: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**COMMON, **WITH_BUFFERS[family])).eval()


def stored_buffers(model: Any) -> dict[str, int]:
    parameters = {name for name, _ in model.named_parameters()}
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    ties = model.all_tied_weights_keys or ()
    return {name: tensor.numel() for name, tensor in state.items() if name not in parameters and name not in ties}


@pytest.mark.parametrize("family", WITH_BUFFERS)
def test_buffers_are_no_parameters(family: str, tmp_path: Path) -> None:
    dense = model_with_buffers(family)
    assert stored_buffers(dense)
    dense.save_pretrained(tmp_path / "dense")
    result = run(tmp_path / "dense", tmp_path / "out")
    loaded = result.load()
    assert result.plan.dense_params == dense.num_parameters()
    assert result.plan.params == loaded.num_parameters()
    assert stored_buffers(loaded) == stored_buffers(dense)
    report = json.loads((tmp_path / "out" / "svdllm" / "report.json").read_text())
    assert (report["params"], report["dense_params"]) == (loaded.num_parameters(), dense.num_parameters())
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{loaded.num_parameters():,}" in card
    assert (
        "shapes",
        f"{len(result.plan.forms)} low-rank linears, {loaded.num_parameters():,} parameters",
    ) in svdllm.verify(tmp_path / "out")


@pytest.mark.parametrize("family", WITH_BUFFERS)
def test_they_are_counted_in_files(family: str, tmp_path: Path) -> None:
    model_with_buffers(family).save_pretrained(tmp_path / "dense")
    result = run(tmp_path / "dense", tmp_path / "out")
    assert result.plan.file_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_a_target_in_parameters_does_not_pay_for_buffers(tmp_path: Path) -> None:
    dense = model_with_buffers("apertus")
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(
        svdllm.InputError, match=rf"is not below what the dense model has \({dense.num_parameters():,}\)"
    ):
        svdllm.plan(tmp_path / "dense", small_recipe(target_params=dense.num_parameters()))


def test_buffers_may_be_infinite_and_weights_may_not(tmp_path: Path) -> None:
    """Limits that were never set are infinite by design."""
    folder, buffer = tmp_path / "dense", "model.layers.1.mlp.act_fn.eps"
    model_with_buffers("apertus").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")

    def stored(name: str, value: float) -> Path:
        changed = tensors | {name: torch.full_like(tensors[name], value)}
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def surveyed(folder: Path) -> str:
        source = open_source(folder)
        assert source.weights is not None
        return survey(source.weights, buffer_names(build_skeleton(source.config)))

    assert surveyed(stored(buffer, float("inf"))) != surveyed(stored(buffer, -float("inf")))
    for name, value in ((buffer, float("nan")), ("model.norm.weight", float("inf"))):
        with pytest.raises(svdllm.NumericalError, match=f"The weights are damaged: {name} has"):
            run(stored(name, value), tmp_path / "out")
