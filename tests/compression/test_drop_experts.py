"""REAP: scores against the formula, weights of the result against slices of the source, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from families import tiny_model
from runs import TEXT
from svdllm import InputError, UnsupportedModelError
from svdllm.common.run_options import RunOptions
from svdllm.compression.drop_experts import check_drop, drop_experts, expert_scores
from svdllm.compression.recipe import Recipe
from svdllm.compression.subject import discover_subject
from svdllm.data import calibration_windows
from svdllm.models.fewer_experts import with_num_experts
from svdllm.models.open import open_source
from svdllm.models.skeleton import build_skeleton
from tokenizers_local import byte_tokenizer

OPTIONS: dict[str, dict[str, Any]] = {"gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2}}


def saved(family: str, folder: Path, **options: Any) -> Any:
    model = tiny_model(family, **{"vocab_size": 290, **OPTIONS.get(family, {}), **options})
    model.save_pretrained(folder / "dense")
    byte_tokenizer().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(TEXT)
    return model


def recipe_of(folder: Path, ratio: float) -> Recipe:
    return Recipe(
        ratio=ratio, calibration=str(folder / "text.txt"), samples=4, seqlen=16, device="cpu", allow_partial=True
    )


def scores_by_formula(model: Any, ids: Tensor) -> list[Tensor]:
    """``mean p ||f_e(x)||`` of every layer, from the stacked tensors of transformers."""
    given: list[Any] = []
    experts = [layer.mlp.experts for layer in model.model.layers]
    handles = [e.register_forward_pre_hook(lambda module, args: given.append((module, args))) for e in experts]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    scores = []
    for module, (hidden_TH, index_TK, weights_TK) in given:
        score_E = torch.zeros(len(module.down_proj))
        for e in range(len(score_E)):
            token, place = torch.where(index_TK == e)
            if len(token):
                gate, up = (hidden_TH[token] @ module.gate_up_proj[e].T).chunk(2, dim=-1)
                output = (torch.nn.functional.silu(gate) * up) @ module.down_proj[e].T
                score_E[e] = (weights_TK[token, place] * output.norm(dim=-1)).mean()
        scores.append(score_E)
    return scores


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_score_is_the_mean_norm_of_the_weighted_output(family: str, tmp_path: Path) -> None:
    model, recipe = saved(family, tmp_path), recipe_of(tmp_path, 0.1)
    subject = discover_subject(open_source(tmp_path / "dense"), recipe)
    windows = calibration_windows(recipe.calibration, byte_tokenizer(), samples=4, seqlen=16, seed=recipe.seed)
    found = expert_scores(subject, recipe, RunOptions())
    for own, expected in zip(found.values(), scores_by_formula(model.eval(), windows.ids), strict=True):
        torch.testing.assert_close(own.float(), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "olmoe"])
def test_the_result_is_a_plain_mixture_of_the_experts_that_are_kept(family: str, tmp_path: Path) -> None:
    dense: dict[str, Tensor] = dict(saved(family, tmp_path).state_dict())
    recipe = recipe_of(tmp_path, 0.2)
    made = drop_experts(tmp_path / "dense", recipe, tmp_path / "out")
    assert made.achieved_ratio == pytest.approx(check_drop(tmp_path / "dense", recipe))
    assert made.achieved_ratio >= 0.2
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded).__name__ == type(AutoModelForCausalLM.from_config(loaded.config)).__name__
    for name, tensor in loaded.state_dict().items():
        own = next((kept for experts, kept in made.kept.items() if name.startswith(experts.rpartition(".")[0])), None)
        expected = dense[name]
        if tensor.shape != expected.shape:
            assert own is not None
            assert len(own) < len(expected)
            expected = expected[own]
        torch.testing.assert_close(tensor, expected, atol=0, rtol=0)
    ids = torch.arange(12)[None]
    assert bool(torch.isfinite(loaded(input_ids=ids).logits).all())
    removed = sum(t.numel() for t in dense.values()) - sum(t.numel() for t in loaded.state_dict().values())
    assert removed > 0


def test_more_experts_are_left_than_a_token_is_routed_to(tmp_path: Path) -> None:
    saved("mixtral", tmp_path)
    with pytest.raises(InputError, match=r"of 4 experts remain, and .* routes a token to 2. Ask for a ratio of at"):
        drop_experts(tmp_path / "dense", recipe_of(tmp_path, 0.8), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="Experts are dropped to one ratio, found none"):
        drop_experts(tmp_path / "dense", recipe_of(tmp_path, 0.1).model_copy(update={"ratio": None}), tmp_path / "out")


def test_a_model_without_experts_has_none_to_drop(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    with pytest.raises(InputError, match="has no experts to drop: expected a mixture of experts"):
        check_drop(tmp_path / "dense", recipe_of(tmp_path, 0.3))


def test_routing_by_groups_is_refused() -> None:
    model = tiny_model("deepseek_v3")
    model.config.n_group = 2
    with pytest.raises(UnsupportedModelError, match=r"routes tokens to 2 groups of experts \(n_group\)"):
        with_num_experts(model.config, build_skeleton(model.config), 3)
