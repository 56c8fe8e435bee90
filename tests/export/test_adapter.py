"""Corrections as an adapter of PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from runs import save_dense, token_windows
from svdllm import InputError, Recipe, UnsupportedModelError, compress
from svdllm.export.adapter import MODELOPT, export_adapter

pytest.importorskip("compressed_tensors")
RANKS = {"up_proj": {"int3-corrected": 8}, "o_proj": {"int4-corrected": 4}, "down_proj|q_proj": {"int4": 32}}


def _compressed(folder: Path, ranks: dict) -> Path:
    save_dense(folder / "dense", hidden_size=64, intermediate_size=96)
    recipe = Recipe(ranks=ranks, calibration_mode="dense", samples=4, seqlen=32)
    return compress(folder / "dense", recipe, folder / "out", calibration=token_windows(4, 32, vocab=300)).output_dir


def test_base_and_adapter_compute_what_the_checkpoint_does(tmp_path: Path):
    peft = pytest.importorskip("peft")
    folder = _compressed(tmp_path, RANKS)
    made = export_adapter(folder, tmp_path / "export")
    assert (made.linears, made.rank) == (4, 8)
    ids = token_windows(2, 16, vocab=300)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "export" / "base", dtype=torch.float32)
    assert base.config.model_type == "llama"
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        alone = base(ids).logits
        found = peft.PeftModel.from_pretrained(base, tmp_path / "export" / "adapter")(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (alone - expected).abs().max() > 1e-3


def test_what_an_adapter_cannot_hold_is_refused(tmp_path: Path):
    plain = _compressed(tmp_path / "a", {"up_proj": {"int4": 32}})
    with pytest.raises(InputError, match="no linears with corrections"):
        export_adapter(plain, tmp_path / "export")
    mixed = _compressed(tmp_path / "b", {"up_proj": {"int3-corrected": 8}, "o_proj": 8})
    with pytest.raises(UnsupportedModelError, match=r"other forms \(pair\)"):
        export_adapter(mixed, tmp_path / "export")
    embedding = _compressed(tmp_path / "c", {"up_proj": {"int3-corrected": 8}, "embed_tokens": {"int8": 32}})
    with pytest.raises(UnsupportedModelError, match=r"--ignore model.embed_tokens"):
        export_adapter(embedding, tmp_path / "export")


def test_by_the_names_of_modelopt_base_and_matrices_make_the_weights(tmp_path: Path):
    """The weight of every corrected linear is its quantised weight and ``svdquant_lora_b @ svdquant_lora_a``."""
    folder = _compressed(tmp_path, RANKS)
    made = export_adapter(folder, tmp_path / "export", MODELOPT)
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["base", "svdquant.safetensors"]
    matrices = load_file(tmp_path / "export" / "svdquant.safetensors")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "export" / "base", dtype=torch.float32)
    with torch.no_grad():
        for model in (whole, base):  # unpacks
            model(token_windows(1, 8, vocab=300))
    names = [name for name, module in whole.named_modules() if type(module).__name__ == "CorrectedLinear"]
    assert len(names) == made.linears == len(matrices) // 2 == 4
    for name in names:
        a_RI = matrices[f"{name}.weight_quantizer.svdquant_lora_a"]
        b_OR = matrices[f"{name}.weight_quantizer.svdquant_lora_b"]
        quantized_OI = base.get_submodule(name).weight
        assert a_RI.shape[1] == quantized_OI.shape[1]
        assert b_OR.shape[0] == quantized_OI.shape[0]
        assert a_RI.shape[0] == b_OR.shape[1] == (8 if "up_proj" in name else 4)
        x_TI = torch.randn(5, a_RI.shape[1])
        with torch.no_grad():
            expected = whole.get_submodule(name)(x_TI)
        torch.testing.assert_close(x_TI @ (quantized_OI + b_OR @ a_RI).mT, expected, rtol=1e-4, atol=1e-5)
