"""Quantised checkpoints in which every form occurs: factors are rounded, orders stay, sizes are known beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import svdllm
from quantized_models import WIDTHS, load, logits
from runs import run, save_dense, small_recipe
from svdllm.checkpoint.quantized import ENTRY_BYTES, NOTE_BYTES, choose_schemes, make_scheme, quantized_bytes
from svdllm.checkpoint.tensors import stored_tensors
from svdllm.checkpoint.weight_sizes import weight_bytes
from svdllm.export.quantize import quantize
from svdllm.models.low_rank import PackedLinear
from svdllm.models.open import open_config
from svdllm.models.skeleton import build_skeleton

# Of blocks of width 64 with 96 inner: packed by columns (q, down) and by rows (v), not in sixteens (o), narrow, pairs.
RANKS = {
    r"layers\.0\.mlp": {"narrow": 48},
    "q_proj|down_proj|v_proj": {"packed": 16},
    "o_proj": {"packed": 9},
    "up_proj": {"pair": 32},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("quantized_forms")
    dense = save_dense(folder / "dense", "qwen2", tokenizer=tokenizer, **WIDTHS)
    return run(dense, folder / "mixed", recipe=small_recipe(ranks=RANKS)).output_dir


@pytest.mark.parametrize("bits", [8, 4])
def test_factors_are_rounded_and_orders_stay(bits: int, checkpoint: Path, tmp_path: Path) -> None:
    result = quantize(checkpoint, tmp_path / "out", bits=bits, format="torchao")
    exact, found = load(checkpoint), load(tmp_path / "out")
    packed = {name for name, module in exact.named_modules() if isinstance(module, PackedLinear)}
    assert len(packed) == 7
    rounded = {linear.name: linear for linear in result.linears}
    assert {f"{name}.{factor}" for name in packed for factor in ("svd_u", "svd_v")} <= rounded.keys()
    others = {name for name, linear in rounded.items() if linear.reason}
    assert others == (set() if bits == 8 else {name for name in rounded if "o_proj" in name})
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "out"))
    for name in packed:
        assert torch.equal(before[f"{name}.order"], after[f"{name}.order"])
        assert all(torch.equal(before[bias], after[bias]) for bias in before if bias == f"{name}.bias")
    weights = {name: w.dequantize() for name, w in found.named_parameters() if hasattr(w, "tensor_data_names")}
    assert len(weights) == len(rounded)
    for name, parameter in exact.named_parameters():
        if name in weights:
            error = (weights[name] - parameter).norm() / parameter.norm()
            assert 0 < error < (0.01 if bits == 8 or name.removesuffix(".weight") in others else 0.15)
            parameter.data = weights[name]
    torch.testing.assert_close(logits(found), logits(exact), rtol=1e-4, atol=1e-5)
    svdllm.verify(tmp_path / "out")


@pytest.mark.parametrize("bits", [8, 4])
def test_bytes_are_known_beforehand(bits: int, checkpoint: Path, tmp_path: Path) -> None:
    source = open_config(checkpoint)
    skeleton = build_skeleton(source.config)
    linears, _ = choose_schemes(skeleton, make_scheme(bits, None))
    schemes = {f"{linear.name}.weight": linear.scheme for linear in linears}
    tensors = stored_tensors(source, skeleton)
    predicted = quantized_bytes(tensors, schemes, num_files=1)
    quantize(checkpoint, tmp_path / "out", bits=bits, format="torchao")
    counted = weight_bytes(tmp_path / "out")
    headers = sum(ENTRY_BYTES + NOTE_BYTES + 5 * len(name) for name in tensors)
    assert predicted - headers == counted.quantized + counted.other
