"""Sequential calibration and bias correction against oracles that hold both streams of tokens in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import stored_ranks
from runs import run, save_dense, small_recipe, token_windows
from svdllm import load_model
from svdllm.compression.math.linalg import anchored, corrected_bias, factorise, output_spectrum
from svdllm.compression.products import Products, relative_error
from svdllm.compression.sequential import Sequential


def streams(seed: int = 0, features: int = 6, tokens: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(5, features, generator=generator, dtype=torch.float64)
    dense_IT = torch.randn(features, tokens, generator=generator, dtype=torch.float64) + 0.5
    compressed_IT = dense_IT + 0.3 * torch.randn(features, tokens, generator=generator, dtype=torch.float64)
    return weight_OI, dense_IT, compressed_IT


def products(dense_IT: Tensor, compressed_IT: Tensor) -> Products:
    return Products(
        dense_IT @ dense_IT.T,
        compressed_IT @ compressed_IT.T,
        dense_IT @ compressed_IT.T,
        dense_IT.sum(1),
        compressed_IT.sum(1),
        dense_IT.shape[1],
    )


def test_anchored_with_beta_one_is_the_regression_on_the_dense_outputs():
    weight_OI, dense_IT, compressed_IT = streams()
    found = products(dense_IT, compressed_IT)
    expected = torch.linalg.lstsq(compressed_IT.T, (weight_OI @ dense_IT).T).solution.T
    torch.testing.assert_close(anchored(weight_OI, found.compressed_II, found.cross_II, 1.0), expected)
    assert torch.equal(anchored(weight_OI, found.compressed_II, found.cross_II, 0.0), weight_OI)
    halfway = anchored(weight_OI, found.compressed_II, found.cross_II, 0.5)
    torch.testing.assert_close(halfway, (weight_OI + expected) / 2)


@pytest.mark.parametrize("rank", [1, 3])
def test_anchored_factors_are_the_best_of_their_rank(rank: int):
    """Of all W' of the rank, none brings W' X' nearer to W X: reduced-rank regression."""
    weight_OI, dense_IT, compressed_IT = streams()
    found = products(dense_IT, compressed_IT)
    star_OI = anchored(weight_OI, found.compressed_II, found.cross_II, 1.0)
    u_OR, v_RI = factorise(star_OI, output_spectrum(star_OI, found.compressed_II), rank)
    fitted_OT = star_OI @ compressed_IT
    left, sigma, right = torch.linalg.svd(fitted_OT, full_matrices=False)
    best_OT = (left[:, :rank] * sigma[:rank]) @ right[:rank]
    torch.testing.assert_close(u_OR @ v_RI @ compressed_IT, best_OT)
    loss = ((weight_OI @ dense_IT - u_OR @ v_RI @ compressed_IT) ** 2).sum() / ((weight_OI @ dense_IT) ** 2).sum()
    assert relative_error(weight_OI, u_OR @ v_RI, found) == pytest.approx(float(loss))


def test_products_are_centred_like_the_tokens():
    _, dense_IT, compressed_IT = streams()
    centred = products(dense_IT, compressed_IT).centred()
    dense_IT, compressed_IT = (x - x.mean(1, keepdim=True) for x in (dense_IT, compressed_IT))
    torch.testing.assert_close(centred.dense_II, dense_IT @ dense_IT.T)
    torch.testing.assert_close(centred.compressed_II, compressed_IT @ compressed_IT.T)
    torch.testing.assert_close(centred.cross_II, dense_IT @ compressed_IT.T)


def test_shrinking_keeps_the_weight_where_the_streams_agree():
    weight_OI, dense_IT, _ = streams(tokens=3)  # a singular Gram
    shrunk = products(dense_IT, dense_IT).shrunk(0.2)
    assert torch.equal(shrunk.compressed_II, shrunk.cross_II)
    torch.testing.assert_close(anchored(weight_OI, shrunk.compressed_II, shrunk.cross_II, 1.0), weight_OI)


def test_parts_of_the_text_add_up():
    _, dense_IT, compressed_IT = streams()
    whole = products(dense_IT, compressed_IT)
    parts = products(dense_IT[:, :13], compressed_IT[:, :13]).plus(products(dense_IT[:, 13:], compressed_IT[:, 13:]))
    for ours, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_corrected_bias_and_centred_factors_are_the_best_affine_map():
    weight_OI, inputs_IT, _ = streams()
    mean_I = inputs_IT.mean(1)
    centred_IT = inputs_IT - mean_I[:, None]
    u_OR, v_RI = factorise(weight_OI, output_spectrum(weight_OI, centred_IT @ centred_IT.T), 2)
    bias_O = corrected_bias(weight_OI, u_OR, v_RI, mean_I, mean_I, None)
    error_OT = weight_OI @ inputs_IT - u_OR @ v_RI @ inputs_IT - bias_O[:, None]
    _, sigma, _ = torch.linalg.svd(weight_OI @ centred_IT, full_matrices=False)
    torch.testing.assert_close((error_OT**2).sum(), (sigma[2:] ** 2).sum())
    plain_u, plain_v = factorise(weight_OI, output_spectrum(weight_OI, inputs_IT @ inputs_IT.T), 2)
    assert (error_OT**2).sum() < ((weight_OI @ inputs_IT - plain_u @ plain_v @ inputs_IT) ** 2).sum()


def inputs_in(model: Any, name: str, ids: Tensor) -> Tensor:
    """The tokens that a module of a model is handed, ``in x T``."""
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return found[0].flatten(0, -2).T.double()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_every_linear_is_fitted_to_the_inputs_of_the_compressed_model(
    family: str, bias_correction: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The oracle runs the written model: each linear's inputs in it are those that it was fitted to."""
    monkeypatch.setattr("svdllm.compression.products.RIDGE", 1e-12)  # the oracle has none
    dense = save_dense(tmp_path / "dense", family)
    ids = token_windows(samples=8, seqlen=12)
    recipe = small_recipe(
        calibration_mode="sequential",
        beta=1.0,
        sequential_shrinkage=0.0,
        dtype="float64",
        bias_correction=bias_correction,
        seqlen=12,
    )
    run(dense, tmp_path / "out", ids=ids, recipe=recipe)
    models = {name: load_model(tmp_path / name, dtype=torch.float64).eval() for name in ("dense", "out")}
    for name in stored_ranks(models["out"].config):
        layer = models["out"].get_submodule(name)
        compressed_IT = inputs_in(models["out"], name, ids)
        dense_IT = inputs_in(models["dense"], name, ids)
        original = models["dense"].get_submodule(name)
        weight_OI = original.weight.double().detach()
        weight_OI = weight_OI.T if family == "gpt2" else weight_OI
        if bias_correction:
            bias_O = 0 if original.bias is None else original.bias.double().detach()
            outputs = layer.svd_u.weight @ (layer.svd_v.weight @ compressed_IT) + layer.svd_u.bias[:, None]
            wanted = weight_OI @ dense_IT + (bias_O[:, None] if isinstance(bias_O, Tensor) else 0)
            torch.testing.assert_close(outputs.mean(1).detach(), wanted.mean(1), rtol=1e-4, atol=1e-5)
            dense_IT = dense_IT - dense_IT.mean(1, keepdim=True)
            compressed_IT = compressed_IT - compressed_IT.mean(1, keepdim=True)
        target_OT = weight_OI @ dense_IT
        regression = torch.linalg.lstsq(compressed_IT.T, target_OT.T, driver="gelsd").solution.T @ compressed_IT
        rank = layer.svd_v.weight.shape[0]
        left, sigma, right = torch.linalg.svd(regression, full_matrices=False)
        best = ((target_OT - (left[:, :rank] * sigma[:rank]) @ right[:rank]) ** 2).sum()
        ours = ((target_OT - layer.svd_u.weight @ (layer.svd_v.weight @ compressed_IT)) ** 2).sum()
        assert ours <= best * 1.01 + 1e-9, name


def best_beta(
    weights: list[Tensor], ranks: list[int], dense_IT: Tensor, compressed_IT: Tensor, fitted: slice, judged: slice
) -> float:
    """The beta whose factors, fitted to some tokens, come nearest to the dense outputs on others; without any Gram."""
    errors = dict.fromkeys((0.0, 0.5, 1.0), 0.0)
    for weight_OI, rank in zip(weights, ranks, strict=True):
        x_IT, target_OT = compressed_IT[:, fitted], weight_OI @ dense_IT[:, fitted]
        regression_OI = torch.linalg.lstsq(x_IT.T, target_OT.T, driver="gelsd").solution.T
        for beta in errors:
            star_OT = (beta * regression_OI + (1 - beta) * weight_OI) @ x_IT
            left, _, _ = torch.linalg.svd(star_OT, full_matrices=False)
            product_OI = left[:, :rank] @ left[:, :rank].T @ (beta * regression_OI + (1 - beta) * weight_OI)
            wanted_OT = weight_OI @ dense_IT[:, judged]
            lost = (wanted_OT - product_OI @ compressed_IT[:, judged]).square().sum() / wanted_OT.square().sum()
            errors[beta] += float(lost)
    return min(errors, key=errors.__getitem__)


def test_beta_is_the_best_on_the_last_eighth_of_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two of sixteen windows, a batch each, are held out; their tokens follow each other otherwise.
    The oracle has no Grams.

    Were the factors fitted to them as well, or more or fewer of them held out, some group would get another beta.
    """
    monkeypatch.setattr("svdllm.compression.products.RIDGE", 1e-12)  # the oracle has none
    dense, seqlen = save_dense(tmp_path / "dense"), 12
    ids = torch.cat([token_windows(14, seqlen, vocab=20, seed=1), token_windows(2, seqlen, vocab=20, seed=5)])
    recipe = small_recipe(
        calibration_mode="sequential", sequential_shrinkage=0.0, samples=16, sequential_samples=16, seqlen=seqlen,
        batch_tokens=seqlen, dtype="float64", ratio=0.5, bias_correction=False,
    )  # fmt: skip
    run(dense, tmp_path / "out", ids=ids, recipe=recipe)
    betas = json.loads((tmp_path / "out" / "svdllm" / "report.json").read_text())["betas"]
    models = {name: load_model(tmp_path / name, dtype=torch.float64).eval() for name in ("dense", "out")}
    ranks = stored_ranks(models["out"].config)
    tokens, differs = 16 * seqlen, {"fitted to all": 0, "a quarter": 0, "one batch": 0}
    for block in range(2):
        for leaves in (("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)):
            names = [f"model.layers.{block}.{leaf}" for leaf in leaves]
            weights = [models["dense"].get_submodule(name).weight.detach() for name in names]
            given = (weights, [ranks[name] for name in names])
            given += tuple(inputs_in(models[name], names[0], ids) for name in ("dense", "out"))
            last = {share: slice(tokens - share * seqlen, tokens) for share in (1, 2, 4)}
            first = {share: slice(0, tokens - share * seqlen) for share in last}
            chosen = best_beta(*given, first[2], last[2])
            assert {betas[name] for name in names} == {chosen}, names
            differs["fitted to all"] += best_beta(*given, slice(0, tokens), last[2]) != chosen
            differs["a quarter"] += best_beta(*given, first[4], last[4]) != chosen
            differs["one batch"] += best_beta(*given, first[1], last[1]) != chosen
    assert all(differs.values()), differs


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_bias_correction_keeps_the_mean_output_and_the_budget(family: str, tmp_path: Path):
    dense = save_dense(tmp_path / "dense", family)
    ids = token_windows(samples=8, seqlen=12)
    result = run(dense, tmp_path / "out", ids=ids, recipe=small_recipe(bias_correction=True, seqlen=12))
    model = load_model(tmp_path / "out").eval()
    assert model.num_parameters() == result.plan.params
    assert result.plan.achieved_ratio >= 0.3
    original = load_model(dense).eval()
    name = next(iter(result.plan.forms))  # its inputs are the dense model's
    inputs_IT = inputs_in(original, name, ids).float()
    with torch.no_grad():
        difference = model.get_submodule(name)(inputs_IT.T).mean(0) - original.get_submodule(name)(inputs_IT.T).mean(0)
    torch.testing.assert_close(difference, torch.zeros_like(difference), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias_correction", [False, True])
def test_losses_are_tails_of_the_svd_of_weights_times_inputs(bias_correction: bool, tmp_path: Path):
    """With a bias to take care of the mean, of the inputs less their mean."""
    dense = save_dense(tmp_path / "dense")
    ids = token_windows(samples=8, seqlen=12)
    recipe = small_recipe(bias_correction=bias_correction, dtype="float64", seqlen=12)
    result = run(dense, tmp_path / "out", ids=ids, recipe=recipe)
    original = load_model(dense, dtype=torch.float64).eval()
    for row in result.linears:
        inputs_IT = inputs_in(original, row.name, ids)
        if bias_correction:
            inputs_IT = inputs_IT - inputs_IT.mean(1, keepdim=True)
        sigma = torch.linalg.svdvals(original.get_submodule(row.name).weight.detach() @ inputs_IT)
        assert row.rank is not None
        assert row.loss == pytest.approx(float(sigma[row.rank :].norm()), rel=1e-6), row.name
        assert row.relative_loss == pytest.approx(float(sigma[row.rank :].norm() / sigma.norm()), rel=1e-6), row.name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_linear_that_stays_dense_is_fitted_too(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("svdllm.compression.products.RIDGE", 1e-12)
    dense = save_dense(tmp_path / "dense", family)
    ids = token_windows(samples=8, seqlen=12)
    first = {"llama": r"layers.0.*q_proj", "gpt2": r"h.0.*c_attn"}[family]
    recipe = small_recipe(
        ranks={first: 3},
        calibration_mode="sequential",
        beta=1.0,
        sequential_shrinkage=0.0,
        dtype="float64",
        seqlen=12,
        allocation="uniform",
    )
    run(dense, tmp_path / "out", ids=ids, recipe=recipe)
    before, after = (load_model(tmp_path / name, dtype=torch.float64).eval() for name in ("dense", "out"))
    name = {"llama": "model.layers.0.self_attn.o_proj", "gpt2": "transformer.h.0.attn.c_proj"}[family]
    weights = [model.get_submodule(name).weight.detach() for model in (before, after)]
    old_OI, new_OI = (weight.T for weight in weights) if family == "gpt2" else weights
    assert not torch.equal(old_OI, new_OI)
    wanted_OT = old_OI @ inputs_in(before, name, ids)
    seen_IT = inputs_in(after, name, ids)
    best_OT = torch.linalg.lstsq(seen_IT.T, wanted_OT.T, driver="gelsd").solution.T @ seen_IT
    best, ours = (((wanted_OT - outputs) ** 2).sum() for outputs in (best_OT, new_OI @ seen_IT))
    plain = ((wanted_OT - old_OI @ seen_IT) ** 2).sum()
    assert ours <= best * 1.01 + 1e-9 < plain
    untouched = {"llama": "model.layers.0.self_attn.k_proj", "gpt2": None}[family]
    if untouched:  # its inputs are the dense model's
        assert torch.equal(before.get_submodule(untouched).weight, after.get_submodule(untouched).weight)


def test_keys_that_layers_share_are_those_of_their_own_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The products of every group against whole models: the last two layers read keys and values of the first two."""
    found: dict[str, Products] = {}
    products_of = Sequential._products

    def spy(self: Any, block: Any, leader: Any, replaced: Any) -> Any:
        fitted, held_out = products_of(self, block, leader, replaced)
        found[leader.name] = fitted.plus(held_out)
        return fitted, held_out

    monkeypatch.setattr(Sequential, "_products", spy)
    dense = save_dense(tmp_path / "dense", "gemma4_text")
    ids = token_windows(samples=8, seqlen=12)
    recipe = small_recipe(calibration_mode="sequential", beta=1.0, dtype="float64", seqlen=12)
    run(dense, tmp_path / "out", ids=ids, recipe=recipe)
    before, after = (load_model(tmp_path / name, dtype=torch.float64).eval() for name in ("dense", "out"))
    assert len(found) == 4 * 6  # a group that q alone makes counts as well as q, k and v
    for name, sums in found.items():
        dense_IT, compressed_IT = inputs_in(before, name, ids), inputs_in(after, name, ids)
        expected = {
            "dense_II": dense_IT @ dense_IT.T,
            "compressed_II": compressed_IT @ compressed_IT.T,
            "cross_II": dense_IT @ compressed_IT.T,
        }
        for product, wanted_II in expected.items():
            assert (getattr(sums, product) - wanted_II).norm() < 1e-4 * wanted_II.norm(), (name, product)
