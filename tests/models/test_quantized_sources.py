"""Quantised sources are read as the dense models of their dequantised weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import svdllm
from families import tiny_tokens
from quantized_sources import CASES, COMPRESSED_TENSORS, Case, change_tensors, set_config, write_models
from svdllm.models.open import open_config, open_source
from svdllm.models.quantized_sources.methods import tensors_in

EVERY_CASE = CASES | COMPRESSED_TENSORS
LINEAR = "model.layers.0.self_attn.o_proj"  # of every family
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def case_named(name: str) -> Case:
    if name in COMPRESSED_TENSORS:
        pytest.importorskip("compressed_tensors")
    return EVERY_CASE[name]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tiny_tokens()).logits


@pytest.mark.parametrize("name", EVERY_CASE)
def test_weights_are_those_of_the_dense_model(name: str, tmp_path: Path) -> None:
    case = case_named(name)
    quantized, dense = map(open_source, write_models(case, tmp_path))
    assert quantized.weights is not None
    assert dense.weights is not None
    assert set(quantized.weights.names()) == set(dense.weights.names())
    for tensor in dense.weights.names():
        assert quantized.weights.shape_and_dtype(tensor) == dense.weights.shape_and_dtype(tensor)
        assert torch.equal(quantized.weights.get(tensor), dense.weights.get(tensor)), tensor
    assert quantized.dtype == case.dtype
    assert quantized.unused is None
    assert not hasattr(quantized.config, "quantization_config")
    assert _without_place(quantized.config) == _without_place(dense.config)


@pytest.mark.parametrize("name", ["fp8", "mxfp4", "awq", "pack-quantized experts"])
def test_a_model_is_loaded_dense(name: str, tmp_path: Path) -> None:
    quantized, dense = write_models(case_named(name), tmp_path)
    model = svdllm.load_model(quantized, dtype=torch.float32)
    assert torch.equal(logits(model), logits(svdllm.load_model(dense, dtype=torch.float32)))
    assert svdllm.load_model(quantized).dtype == svdllm.load_model(dense).dtype


@pytest.mark.parametrize("name", ["fp8 scale", "mxfp4"])
def test_transformers_dequantises_alike(name: str, tmp_path: Path) -> None:
    """transformers loads these as dense models too, where there is no GPU."""
    quantized, _ = write_models(case_named(name), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.bfloat16, use_kernels=False)
    assert torch.equal(logits(svdllm.load_model(quantized, dtype=torch.bfloat16)), logits(theirs))


def test_one_weight_of_a_stack_is_read_alone(tmp_path: Path) -> None:
    codes = torch.randn(3, 5, 8).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 3, 2)
    save_file({"up": codes, "up_scale_inv": scales}, tmp_path / "model.safetensors")
    settings = {"quant_method": "fp8", "weight_block_size": [2, 4]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    stack = tensors_in(tmp_path)["up"]
    expected = codes.float() * scales.repeat_interleave(2, 1)[:, :5].repeat_interleave(4, 2)
    assert torch.equal(stack.read(), expected.bfloat16())
    assert torch.equal(stack.read_part(2), expected[2].bfloat16())
    assert stack.shape == (3, 5, 8)


DAMAGE: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], str]] = {
    "no scale": ("fp8", lambda tensors: tensors.pop(f"{LINEAR}.weight_scale_inv"), "stored without its scale"),
    "a scale of another shape": (
        "fp8 scale",
        lambda tensors: tensors.update({f"{LINEAR}.scale": tensors[f"{LINEAR}.scale"][:1].clone()}),
        r"scale: found shape \(1, 2\), expected \(2, 2\)",
    ),
    "no zero points": ("gptq 4", lambda tensors: tensors.pop(f"{LINEAR}.qzeros"), "stored without its zero points"),
    "a short group index": (
        "gptq shuffled",
        lambda tensors: tensors.update({f"{LINEAR}.g_idx": torch.arange(3, dtype=torch.int32)}),
        r"group index: found shape \(3,\), expected \(32,\)",
    ),
    "scaled activations": (
        "awq",
        lambda tensors: tensors.update({"model.layers.0.mlp.act.scales": torch.ones(64)}),
        "mlp.act.scales belongs to no quantised weight",
    ),
    "scales of too few blocks": (
        "mxfp4",
        lambda tensors: tensors.update({f"{EXPERTS}_scales": tensors[f"{EXPERTS}_scales"][:, :3].clone()}),
        r"scales: found shape \(2, 3, 1\), expected \(2, 128, 1\)",
    ),
    "a packed weight without its scale": (
        "pack-quantized",
        lambda tensors: tensors.pop(f"{LINEAR}.weight_scale"),
        "stored without its weight_scale",
    ),
    "an order of activations": (
        "pack-quantized",
        lambda tensors: tensors.update({f"{LINEAR}.weight_g_idx": torch.zeros(32, dtype=torch.int32)}),
        "activation order",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_named(damage: str, tmp_path: Path) -> None:
    name, change, message = DAMAGE[damage]
    quantized, _ = write_models(case_named(name), tmp_path)
    change_tensors(quantized, change)
    for use in (open_config, svdllm.load_model):
        with pytest.raises(svdllm.CheckpointError, match=message):
            use(quantized)


SETTINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "other blocks": ("fp8", {"weight_block_size": [16, 16]}, "scale: found shape .*, expected"),
    "half a block": ("fp8", {"weight_block_size": [8]}, "expected two positive integers"),
    "other groups": ("gptq 4", {"group_size": 8}, r"scales \(groups of 8 inputs\): found shape"),
    "other bits": ("gptq 4", {"bits": 8}, "found shape"),
    "five bits": ("gptq 4", {"bits": 5}, "bits are 5, expected 2 or 3 or 4 or 8"),
    "marlin": ("gptq 4", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin', expected gptq or gptq_v2"),
    "gemv": ("awq", {"version": "gemv"}, "version is 'gemv', expected gemm"),
    "rounded anew": ("bitnet", {"linear_class": "autobitlinear", "quantization_mode": "online"}, "stored packed"),
    "other groups, packed": (
        "pack-quantized",
        {"config_groups": {"one": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 8}}}},
        "the config asks for",
    ),
    "no such format": ("pack-quantized", {"format": "marlin-24"}, "'marlin-24' is not known"),
    "rotated": ("pack-quantized", {"transform_config": {"config_groups": {"one": {}}}}, "transform_config"),
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings_that_do_not_fit_the_files(settings: str, tmp_path: Path) -> None:
    name, entries, message = SETTINGS[settings]
    case = case_named(name)
    quantized, _ = write_models(case, tmp_path)
    set_config(quantized, quantization_config=case.settings | entries)
    with pytest.raises((svdllm.CheckpointError, svdllm.UnsupportedModelError), match=message):
        open_config(quantized)


def test_methods_that_are_not_known(tmp_path: Path) -> None:
    quantized, _ = write_models(CASES["bitnet"], tmp_path)
    set_config(quantized, quantization_config={"quant_method": "aqlm"})
    with pytest.raises(svdllm.UnsupportedModelError, match=r"is quantised \(aqlm\).*Use the model that it was made of"):
        open_config(quantized)


def test_floats_of_8_bits_without_a_method(tmp_path: Path) -> None:
    quantized, _ = write_models(CASES["fbgemm_fp8"], tmp_path)
    set_config(quantized, quantization_config=None)
    with pytest.raises(svdllm.UnsupportedModelError, match=r"is of dtype float8_e4m3fn, but config.json has no"):
        open_config(quantized)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, _ = write_models(COMPRESSED_TENSORS["int-quantized"], tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(svdllm.InputError, match=r"needs the package 'compressed_tensors': pip install"):
        open_config(quantized)


def _without_place(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
