"""GGUF files of models in few bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import svdllm
from runs import save_dense, token_windows
from svdllm import InputError, Recipe, UnsupportedModelError, compress
from svdllm.export.gguf import export_gguf
from svdllm.export.gguf_blocks import block_type, blocks_of
from tokenizers_local import byte_tokenizer

gguf = pytest.importorskip("gguf")
WIDTHS = {"hidden_size": 64, "intermediate_size": 96}
TEXT = {"samples": 4, "seqlen": 32}


def _compressed(folder: Path, ranks: dict[str, Any], family: str = "llama") -> Path:
    pytest.importorskip("compressed_tensors")
    save_dense(folder / "dense", family, tokenizer=byte_tokenizer(), **WIDTHS)
    recipe = Recipe(ranks=ranks, calibration_mode="dense", **TEXT)
    return compress(folder / "dense", recipe, folder / "out", calibration=token_windows(4, 32, vocab=250)).output_dir


@pytest.mark.parametrize("bits", [2, 4, 5, 6, 8])
def test_blocks_are_read_as_scale_times_code(bits: int):
    generator = torch.Generator().manual_seed(bits)
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (3, 128), generator=generator).to(torch.int8)
    scales = torch.tensor([[0.5, -0.25], [1.0, 2.0], [0.125, 3.0]])
    read = gguf.quants.dequantize(blocks_of(codes.numpy(), scales.numpy(), bits), block_type(bits))
    expected = codes.view(3, 2, 64) * scales[..., None]
    np.testing.assert_array_equal(read, expected.view(3, 128).numpy())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_file_is_read_by_the_reader_and_by_transformers(tmp_path: Path, family: str):
    ranks = {"q_proj": {"int4": 32}, "up_proj": {"int8": 32}, "down_proj": {"int5": 32}, "embed": {"int8": 64}}
    folder = _compressed(tmp_path, ranks, family)
    made = export_gguf(folder, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.attn_q.weight"] == "Q4_0"
    assert types["blk.1.ffn_down.weight"] == "Q5_0"
    assert types["token_embd.weight"] == "Q8_0"
    assert made.difference < 1e-3
    with pytest.raises(InputError, match=r"quantised already \(GGUF: Q4_0, Q5_0, Q8_0\)"):
        svdllm.plan(tmp_path / "model.gguf", Recipe(target_size=10**5, **TEXT))
    ids = token_windows(2, 16, vocab=250)
    both = [svdllm.load_model(place, dtype=torch.float32) for place in (folder, tmp_path / "model.gguf")]
    with torch.no_grad():
        expected, found = (model(ids).logits for model in both)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_low_rank_is_refused_with_what_would_be_lost(tmp_path: Path):
    folder = _compressed(tmp_path, {"q_proj": 8})
    with pytest.raises(UnsupportedModelError, match=r"2 linears in forms that GGUF does not have \(pair\).*lost"):
        export_gguf(folder, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_other_models_and_existing_files_are_refused(tmp_path: Path):
    save_dense(tmp_path / "opt", "opt", tokenizer=byte_tokenizer())
    with pytest.raises(UnsupportedModelError, match="found opt"):
        export_gguf(tmp_path / "opt", tmp_path / "model.gguf")
    save_dense(tmp_path / "llama", tokenizer=byte_tokenizer())
    (tmp_path / "model.gguf").touch()
    with pytest.raises(InputError, match="exists already"):
        export_gguf(tmp_path / "llama", tmp_path / "model.gguf")
