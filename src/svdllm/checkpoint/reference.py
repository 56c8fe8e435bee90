"""Computes and stores the logits that a checkpoint gives for a few fixed tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from svdllm.checkpoint.load import load_model
from svdllm.common.errors import NumericalError
from svdllm.common.files import save_tensors
from svdllm.models.discover import discover_blocks
from svdllm.models.logits import full_precision
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.skeleton import build_skeleton
from svdllm.models.walk import Walk
from svdllm.models.weights import SafetensorsWeights

REFERENCE_FILE = "svdllm/reference.safetensors"
REFERENCE_TOKENS = 16
REFERENCE_POSITIONS = 4


def write_reference(folder: Path, config: PreTrainedConfig, device: torch.device, scratch: Path | None = None) -> None:
    """Stores the reference logits of a checkpoint in it; see ``reference_logits``."""
    ids, logits = reference_logits(folder, config, device, scratch)
    save_tensors({"token_ids": ids, "logits": logits}, folder / REFERENCE_FILE)


@full_precision()
def reference_logits(
    folder: Path, config: PreTrainedConfig, device: torch.device, scratch: Path | None = None
) -> tuple[Tensor, Tensor]:
    """Computes the logits of a few fixed tokens from the files of a folder, in float32.

    Args:
        scratch: a folder for the weights of the experts of one block, in place of the memory.

    Returns:
        Token ids (1 x ``REFERENCE_TOKENS``) and the logits of the last ``REFERENCE_POSITIONS`` of them.

    Raises:
        NumericalError: a logit is not finite.
    """
    ids = (torch.arange(REFERENCE_TOKENS).unsqueeze(0) * 7919 + 11) % config.get_text_config().vocab_size
    info = LowRankInfo.of(config)
    if getattr(config, "quantization_config", None) or (info is not None and info.embeddings):
        computed = _loaded_logits(folder, config, ids, device)
    else:
        computed = _walked_logits(folder, config, ids, device, scratch)
    logits = computed[:, -REFERENCE_POSITIONS:].float().cpu().contiguous()
    if not bool(torch.isfinite(logits).all()):
        raise NumericalError("The compressed model's logits are not finite.")
    return ids, logits


def _walked_logits(
    folder: Path, config: PreTrainedConfig, ids: Tensor, device: torch.device, scratch: Path | None
) -> Tensor:
    """Computes the logits with one block in memory at a time."""
    skeleton = build_skeleton(config)
    weights = SafetensorsWeights(folder, skeleton)
    structure = discover_blocks(skeleton)
    walk = Walk(weights, skeleton, structure, ids, device, dtype=torch.float32, scratch=scratch)
    for block in walk.blocks():
        block.run()
    return walk.logits()


@torch.no_grad()
def _loaded_logits(folder: Path, config: PreTrainedConfig, ids: Tensor, device: torch.device) -> Tensor:
    """Computes the logits with a loaded model, the only way to read quantised weights."""
    model = load_model(folder, dtype=torch.float32).to(device)  # type: ignore[arg-type]
    return model.eval()(input_ids=ids.to(device), use_cache=False).logits
