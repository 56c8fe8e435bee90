"""Every step of a run on a dozen families of each kind that is not a plain decoder: mixtures of experts and hybrids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import tiny_model, tiny_tokens
from runs import run, small_recipe
from svdllm import verify

OPTIONS: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {"moe_layers": [0, 1], "num_local_experts": 4, "num_experts_per_tok": 1},
}
MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe", "granitemoe"]
MIXTURES += ["phimoe", "minimax_m2", *OPTIONS]
HYBRIDS = ["mamba", "mamba2", "falcon_mamba", "falcon_h1", "bamba", "jamba", "granitemoehybrid", "lfm2"]
HYBRIDS += ["qwen3_5_text", "recurrent_gemma"]
HYBRID_MIXTURES = ["lfm2_moe", "qwen3_next"]


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_tokens(), use_cache=False).logits


def generated(model: Any, *, use_cache: bool) -> Tensor:
    """The logits of two tokens that follow a prompt (2 x vocabulary)."""
    made = model.generate(
        input_ids=tiny_tokens(1),
        use_cache=use_cache,
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.cat(made.logits)


@pytest.mark.parametrize("family", [*MIXTURES, *HYBRIDS, *HYBRID_MIXTURES])
def test_a_family_goes_through_every_step(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, **OPTIONS.get(family, {}))
    full = run(model, tmp_path / "full", recipe=small_recipe(ranks={".": "full"}, allow_partial=True))
    torch.testing.assert_close(logits_of(full.load(dtype=torch.float32)), logits_of(model), atol=2e-4, rtol=1e-3)

    recipe = small_recipe(metric="two-sided", ratio=0.3, calibration_mode="sequential", allow_partial=True)
    result = run(model, tmp_path / "out", recipe=recipe)
    made: Any = result.load(dtype=torch.float32).eval()
    assert made.num_parameters() == result.plan.params < model.num_parameters()
    assert bool(result.plan.structure.pools) == (family not in HYBRIDS)
    cached, plain = generated(made, use_cache=True), generated(made, use_cache=False)
    torch.testing.assert_close(cached, plain, atol=1e-4, rtol=1e-3)
    verify(tmp_path / "out", "cpu")
