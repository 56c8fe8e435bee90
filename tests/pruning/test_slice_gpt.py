"""SliceGPT against the dense model whose residual is projected, written out for each family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from families import tiny_model, tiny_tokens
from runs import token_windows
from svdllm import Pruning, UnsupportedModelError, load_model, prune
from svdllm.checkpoint.report import read_report
from svdllm.models.norms import scale_and_shift, subtracts_mean
from svdllm.pruning import slice_gpt
from svdllm.pruning.slice_gpt import principal_axes

# What makes a family sequential; OPT calls the linears of its MLP itself, GPT-2 keeps weights as (in, out).
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "opt": {},
    "gpt2": {},
    "stablelm": {},
    "gpt_neox": {"use_parallel_residual": False},
}
Part = Callable[[Tensor], Tensor]


def sliced(model: Any, folder: Path, ratio: float = 0.25) -> Any:
    settings = Pruning(pruning="slicegpt", ratio=ratio, samples=8, seqlen=16, batch_tokens=32)
    prune(model, settings, folder, calibration=token_windows())
    return load_model(folder)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_tokens(), use_cache=False).logits


def test_principal_axes_are_those_of_the_gram() -> None:
    turn, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double())
    gram = turn @ torch.diag(torch.tensor([1.0, 9.0, 4.0, 2.0, 16.0]).double()) @ turn.mT
    axes = principal_axes(gram, 3)
    torch.testing.assert_close((axes.mT @ turn[:, [4, 1, 2]]).abs(), torch.eye(3).double())


@pytest.mark.parametrize("family", FAMILIES)
def test_without_slicing_it_is_the_identity(family: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(slice_gpt, "width_for", lambda job, residual: 32)
    model = tiny_model(family, **FAMILIES[family])
    found = sliced(model, tmp_path / "out", 0.01)
    turns = [module.weight for name, module in found.named_modules() if name.endswith(".shortcut")]
    assert len(turns) == 4
    assert all(float(turn.detach().abs().max()) > 0.1 for turn in turns)  # it is turned
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-3, atol=1e-4)


def parts_of(model: Any, ids: Tensor) -> tuple[Tensor, list[Part], Part]:
    """The embedded tokens, the halves of all blocks without their residual, and what follows."""
    positions = torch.arange(ids.shape[1])
    if model.config.model_type == "gpt2":
        body = model.transformer
        halves = [[lambda h, b=b: b.attn(b.ln_1(h))[0], lambda h, b=b: b.mlp(b.ln_2(h))] for b in body.h]
        hidden, last = body.wte(ids) + body.wpe(positions), body.ln_f
    elif model.config.model_type == "opt":
        body = model.model.decoder
        halves = [
            [
                lambda h, b=b: b.self_attn(b.self_attn_layer_norm(h))[0],
                lambda h, b=b: b.fc2(b.activation_fn(b.fc1(b.final_layer_norm(h)))),
            ]
            for b in body.layers
        ]
        hidden, last = body.embed_tokens(ids) + body.embed_positions.weight[positions + 2], body.final_layer_norm
    else:
        body = model.model
        hidden, last = body.embed_tokens(ids), body.norm
        rotary = {"position_embeddings": body.rotary_emb(hidden, positions[None]), "attention_mask": None}
        halves = [
            [
                lambda h, b=b: b.self_attn(b.input_layernorm(h), **rotary)[0],
                lambda h, b=b: b.mlp(b.post_attention_layernorm(h)),
            ]
            for b in body.layers
        ]
    return hidden, [half for pair in halves for half in pair], lambda h: model.lm_head(last(h))


def sliced_reference(model: Any, width: int) -> Tensor:
    """Logits of the dense model whose residual is projected on its principal axes between all halves of blocks.

    In front of LayerNorm the axes are those of the residual without its mean.
    """
    projections: list[Tensor] = []

    def project(hidden: Tensor, number: int) -> Tensor:
        if any(isinstance(module, nn.LayerNorm) for module in model.modules()):
            hidden = hidden - hidden.mean(-1, keepdim=True)
        if number == len(projections):
            tokens = hidden.flatten(0, 1).double()
            gram = tokens.mT @ tokens
            gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
            axes = torch.linalg.eigh(gram).eigenvectors[:, -width:]
            projections.append(axes @ axes.mT)
        return (hidden.double() @ projections[number]).float()

    def run(ids: Tensor) -> Tensor:
        hidden, halves, head = parts_of(model, ids)
        hidden = project(hidden, 0)
        for number, half in enumerate(halves, start=1):
            hidden = project(hidden + half(hidden), number)
        return head(hidden)

    with torch.no_grad():
        run(token_windows())
        return run(tiny_tokens())


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "gpt2", "stablelm"])
def test_it_is_what_projections_of_the_dense_model_compute(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    found = sliced(model, tmp_path / "out")
    width = read_report(tmp_path / "out")["pruning"]["width"]
    assert width < 32
    assert found.get_input_embeddings().weight.shape == (128, width)
    torch.testing.assert_close(logits(found), sliced_reference(model, width), rtol=1e-3, atol=1e-4)


def test_positions_without_weights_are_refused(tmp_path: Path) -> None:
    """The positions of XGLM are sines, which no rotation of an embedding reaches."""
    sizes = {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}
    config = CONFIG_MAPPING["xglm"](**sizes, vocab_size=128, max_position_embeddings=64)
    with pytest.raises(UnsupportedModelError, match=r"handed more than the sum of model\.embed_tokens"):
        sliced(AutoModelForCausalLM.from_config(config).eval(), tmp_path / "out")


@pytest.mark.parametrize("width", [6, 7])
def test_norms_are_told_by_what_they_compute(width: int) -> None:
    layer = nn.LayerNorm(width)
    assert subtracts_mean(layer) is True
    assert subtracts_mean(nn.RMSNorm(width, eps=1e-5)) is False
    assert subtracts_mean(nn.Linear(width, width)) is None
    given = {"weight": torch.arange(width) + 1.0, "bias": -torch.arange(width).float()}
    scale, shift = scale_and_shift(layer, given)
    torch.testing.assert_close(scale, given["weight"].double(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(shift, given["bias"].double(), rtol=1e-10, atol=1e-10)
