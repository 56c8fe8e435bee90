"""Runs in which tall linears have the pullback of their left metric, against NumPy on the whole model's gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from analysed import analysed, grams_by_autograd
from families import stored_ranks, tiny_model
from runs import inputs_in, run, save_dense, small_recipe, token_windows
from svdllm import load_model
from svdllm.compression.analysis import Analysis
from svdllm.compression.pulled_back import pulled_back

GRADIENTS: dict[str, Any] = {"input_only": (), "gradient_shrinkage": 0.3, "gradient_samples": 4}


def left_root(gradient_OO: Tensor) -> np.ndarray:
    """``L`` with ``L^T L`` the gradients' Gram, 0.3 of its mean diagonal mixed in."""
    metric_OO = 0.7 * gradient_OO / gradient_OO.diagonal().mean() + 0.3 * torch.eye(len(gradient_OO)).double()
    return np.linalg.cholesky(metric_OO.numpy()).T


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_no_gram_of_the_outputs_is_formed(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The widest square that a statistic of the gradients has is not wider than the hidden size."""
    widths: list[int] = []
    write = Analysis.write_left_metrics

    def noted(self: Analysis, block: int, metrics: Any, part: int | None = None) -> None:
        widths.extend(
            max(each.shape) for m in metrics.values() for each in m if isinstance(m, tuple) and each.ndim == 2
        )
        widths.extend(len(m) for m in metrics.values() if isinstance(m, Tensor))
        write(self, block, metrics, part)

    monkeypatch.setattr(Analysis, "write_left_metrics", noted)
    dense = save_dense(tmp_path / "dense", family)
    recipe = small_recipe(metric="two-sided", calibration_mode="sequential", shrinkage=0.1, seqlen=12, **GRADIENTS)
    run(dense, tmp_path / "out", ids=token_windows(samples=8, seqlen=12), recipe=recipe)
    model = tiny_model(family)
    assert widths
    assert max(widths) == model.config.hidden_size


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3"])
def test_a_sequential_fit_is_the_best_in_both_metrics(
    family: str, beta: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The oracle runs the written model: each linear's inputs in it are those that it was fitted to."""
    monkeypatch.setattr("svdllm.compression.products.RIDGE", 1e-12)  # the oracle has none
    dense = save_dense(tmp_path / "dense", family)
    ids = token_windows(samples=8, seqlen=12)
    recipe = small_recipe(
        metric="two-sided",
        calibration_mode="sequential",
        beta=beta,
        shrinkage=0.0,
        sequential_shrinkage=0.0,
        residual_correction=0.0,
        dtype="float64",
        batch_tokens=24,
        seqlen=12,
        **GRADIENTS,
    )
    run(dense, tmp_path / "out", ids=ids, recipe=recipe)
    models = {name: load_model(tmp_path / name, dtype=torch.float64).eval() for name in ("dense", "out")}
    names = list(stored_ranks(models["out"].config))
    oracle = grams_by_autograd(models["dense"], names, ids, ids[:4])
    tall = 0
    for name in names:
        layer, original = models["out"].get_submodule(name), models["dense"].get_submodule(name)
        weight_OI = original.weight.detach().numpy()
        tall += weight_OI.shape[0] > weight_OI.shape[1]
        compressed_IT = inputs_in(models["out"], name, ids).numpy()
        inputs_IT = beta * inputs_in(models["dense"], name, ids).numpy() + (1 - beta) * compressed_IT
        fitted = np.linalg.lstsq(compressed_IT.T, (weight_OI @ inputs_IT).T, rcond=None)[0].T @ compressed_IT
        root_OO = left_root(oracle[name][1])
        ours = (layer.svd_u.weight @ layer.svd_v.weight).detach().numpy() @ compressed_IT
        rank = layer.svd_v.weight.shape[0]
        best = (np.linalg.svd(root_OO @ fitted, compute_uv=False)[rank:] ** 2).sum()
        assert ((root_OO @ (fitted - ours)) ** 2).sum() <= best * (1 + 1e-4) + 1e-9, name
    assert tall


def test_which_targets(tmp_path: Path):
    """Not in few bits, not of experts, and not where the residual stream may be what an output is added to."""
    found = analysed(tiny_model("llama"), tmp_path / "a", token_windows(samples=2, seqlen=10), metric="two-sided")
    skeleton, targets = found.walk.skeleton, found.structure.targets

    def names(**settings: Any) -> set[str]:
        recipe = small_recipe(metric="two-sided", **settings)
        return {name.rpartition(".")[2] for name in pulled_back(targets, recipe, skeleton)}

    assert names() == {"gate_proj", "up_proj"}
    assert names(forms=("int4", "pair"), allocation="loss", target_size=10**6) == set()
    assert pulled_back(targets, small_recipe(metric="input"), skeleton) == set()
    assert pulled_back(targets, small_recipe(method="fwsvd"), skeleton) == set()
    mixture = analysed(tiny_model("mixtral"), tmp_path / "b", token_windows(samples=2, seqlen=10), metric="two-sided")
    assert not any(
        "experts" in name
        for name in pulled_back(mixture.structure.targets, small_recipe(metric="two-sided"), mixture.walk.skeleton)
    )
