"""Loads a compressed model as others do: by the code files beside its weights, where svdllm is not imported."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

EXPECTED = "expected.safetensors"  # token ids and logits, beside the checkpoint
COMPRESSED = "paper"


def load_by_its_code(folder: Path) -> None:
    """Raises AssertionError unless the model gives the expected logits."""
    model = AutoModelForCausalLM.from_pretrained(folder / COMPRESSED, trust_remote_code=True, dtype=torch.float32)
    assert "svdllm" not in sys.modules
    expected = load_file(folder / EXPECTED)
    with torch.no_grad():
        found = model.eval()(input_ids=expected["ids"], use_cache=False).logits.float()
    difference = float((found - expected["logits"]).abs().max())
    assert difference < 1e-4, f"the logits differ by {difference:.1e}"
