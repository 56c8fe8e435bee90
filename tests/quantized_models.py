"""What tests of quantised models share: the ranks of a small checkpoint, and how it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from families import tiny_tokens
from svdllm.cli import main

# Of blocks of width 64 with 96 inner: ranks in sixteens and not, and linears that stay dense.
RANKS = {"q_proj": 16, "v_proj": 9, "up_proj": 32, "down_proj": 32}
WIDTHS = {"hidden_size": 64, "intermediate_size": 96}


def cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    return int(done.value.code or 0)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tiny_tokens()).logits


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)
