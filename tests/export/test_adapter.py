"""Corrections as an adapter of PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from runs import save_dense, token_windows
from svdllm import InputError, Recipe, UnsupportedModelError, compress
from svdllm.export.adapter import export_adapter

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
