"""Sequential calibration and bias correction against oracles that hold both streams of tokens in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import stored_ranks
from runs import inputs_in, run, save_dense, small_recipe, token_windows
from svdllm import load_model
from svdllm.compression.math.linalg import anchored, corrected_bias, factorise, output_spectrum
from svdllm.compression.products import Products, Sums
from svdllm.compression.sequential import Sequential


def streams(seed: int = 0, features: int = 6, tokens: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(5, features, generator=generator, dtype=torch.float64)
    dense_IT = torch.randn(features, tokens, generator=generator, dtype=torch.float64) + 0.5
    compressed_IT = dense_IT + 0.3 * torch.randn(features, tokens, generator=generator, dtype=torch.float64)
    return weight_OI, dense_IT, compressed_IT


def products(dense_IT: Tensor, compressed_IT: Tensor) -> Products:
    return Products(
        compressed_IT @ compressed_IT.T,
        (dense_IT - compressed_IT) @ compressed_IT.T,
        dense_IT.sum(1),
        compressed_IT.sum(1),
        weight=dense_IT.shape[1],
        num_tokens=dense_IT.shape[1],
    )


def test_anchored_with_beta_one_is_the_regression_on_the_dense_outputs():
    weight_OI, dense_IT, compressed_IT = streams()
    found = products(dense_IT, compressed_IT)
    expected = torch.linalg.lstsq(compressed_IT.T, (weight_OI @ dense_IT).T).solution.T
    gram_II = found.compressed_II.clone()
    torch.testing.assert_close(anchored(weight_OI, gram_II, found.missing(weight_OI, 1.0)), expected)
    assert torch.equal(gram_II, found.compressed_II)
    assert torch.equal(anchored(weight_OI, gram_II, found.missing(weight_OI, 0.0)), weight_OI)
    missing_OI = found.missing(weight_OI, 0.5)
    halfway = anchored(weight_OI, gram_II, missing_OI, overwrite=True)
    torch.testing.assert_close(gram_II.mT @ gram_II, found.compressed_II)
    torch.testing.assert_close(halfway, (weight_OI + expected) / 2)
    assert halfway is missing_OI


@pytest.mark.parametrize("rank", [1, 3])
def test_anchored_factors_are_the_best_of_their_rank(rank: int):
    """Of all W' of the rank, none brings W' X' nearer to W X: reduced-rank regression."""
    weight_OI, dense_IT, compressed_IT = streams()
    found = products(dense_IT, compressed_IT)
    star_OI = anchored(weight_OI, found.compressed_II, found.missing(weight_OI, 1.0))
    u_OR, v_RI = factorise(star_OI, output_spectrum(star_OI, found.compressed_II), rank)
    fitted_OT = star_OI @ compressed_IT
    left, sigma, right = torch.linalg.svd(fitted_OT, full_matrices=False)
    best_OT = (left[:, :rank] * sigma[:rank]) @ right[:rank]
    torch.testing.assert_close(u_OR @ v_RI @ compressed_IT, best_OT)


def test_products_are_centred_like_the_tokens():
    _, dense_IT, compressed_IT = streams()
    centred = products(dense_IT, compressed_IT)
    centred.centre()
    dense_IT, compressed_IT = (x - x.mean(1, keepdim=True) for x in (dense_IT, compressed_IT))
    torch.testing.assert_close(centred.compressed_II, compressed_IT @ compressed_IT.T)
    torch.testing.assert_close(centred.difference_II, (dense_IT - compressed_IT) @ compressed_IT.T)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_residual_is_made_up_for_by_regression(beta: float, alone: bool):
    """``W* X'`` comes nearest to the outputs and the residual together; where outputs go nowhere, to the outputs."""
    weight_OI, dense_IT, compressed_IT = streams()
    residual_OT = torch.randn(5, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sums = Sums(6, torch.device("cpu"), (weight_OI, beta) if alone else None)
    for part in (slice(0, 13), slice(13, 40)):
        sums.add(dense_IT[:, part].T, compressed_IT[:, part].T, residual_OT[:, part].T)
    found = sums.value()
    wanted_OT = weight_OI @ (beta * dense_IT + (1 - beta) * compressed_IT) + residual_OT
    expected = torch.linalg.lstsq(compressed_IT.T, wanted_OT.T).solution.T
    torch.testing.assert_close(
        anchored(weight_OI, found.compressed_II, found.missing(weight_OI, beta)), expected, rtol=1e-6, atol=1e-8
    )
    torch.testing.assert_close(found.residual_sum_O, residual_OT.sum(1))
    found.centre()
    dense_IT, compressed_IT, residual_OT = (x - x.mean(1, keepdim=True) for x in (dense_IT, compressed_IT, residual_OT))
    missing_OI = found.missing(weight_OI, beta)
    assert missing_OI is not None
    torch.testing.assert_close(
        missing_OI, (beta * weight_OI @ (dense_IT - compressed_IT) + residual_OT) @ compressed_IT.T
    )
    missing_OI = missing_OI.clone()
    found.shrink(0.2)
    torch.testing.assert_close(found.missing(weight_OI, beta), 0.8 * missing_OI)


def test_shrinking_keeps_the_weight_where_the_streams_agree():
    weight_OI, dense_IT, _ = streams(tokens=3)  # a singular Gram
    shrunk = products(dense_IT, dense_IT)
    shrunk.shrink(0.2)
    torch.testing.assert_close(anchored(weight_OI, shrunk.compressed_II, shrunk.missing(weight_OI, 1.0)), weight_OI)


def test_a_dense_gram_is_mixed_in_as_of_tokens_whose_streams_do_not_differ():
    weight_OI, dense_IT, compressed_IT = streams()
    others_IT = torch.randn(6, 90, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    gram_II = others_IT @ others_IT.T
    metric_II = 0.7 * gram_II + 0.3 * torch.diag(gram_II.diagonal())
    found = products(dense_IT, compressed_IT)
    expected_II, missing_OI = found.compressed_II.clone(), found.missing(weight_OI, 1.0)
    assert missing_OI is not None
    found.mix_in(metric_II, 0.25, scale=40 / 90, shrinkage=0.3)
    torch.testing.assert_close(found.compressed_II, 0.75 * expected_II + 0.25 * 40 / 90 * gram_II)
    torch.testing.assert_close(found.missing(weight_OI, 1.0), 0.75 * missing_OI)


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


# Norm that reads the residual stream -> linear whose output is added to it.
WRITERS = {
    "self_attn.o_proj": "input_layernorm",
    "mlp.down_proj": "post_attention_layernorm",
    "attn.c_proj": "ln_1",
    "mlp.c_proj": "ln_2",
}


def lost_in(models: dict[str, Any], name: str, ids: Tensor) -> Tensor | float:
    """What the residual stream of the written model lacks where a linear's output is added to it (``out x T``)."""
    block, _, leaf = name.rpartition(".")
    block, _, module = block.rpartition(".")
    if (norm := WRITERS.get(f"{module}.{leaf}")) is None:
        return 0.0
    return inputs_in(models["dense"], f"{block}.{norm}", ids) - inputs_in(models["out"], f"{block}.{norm}", ids)


@pytest.mark.parametrize(
    ("family", "residual_correction"), [("llama", 0.0), ("gpt2", 0.0), ("gpt_neox", 0.0), ("llama", 1.0), ("gpt2", 0.6)]
)
@pytest.mark.parametrize("bias_correction", [False, True])
def test_every_linear_is_fitted_to_the_inputs_of_the_compressed_model(
    family: str, residual_correction: float, bias_correction: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The oracle runs the written model: each linear's inputs in it are those that it was fitted to."""
    monkeypatch.setattr("svdllm.compression.products.RIDGE", 1e-12)  # the oracle has none
    dense = save_dense(tmp_path / "dense", family)
    ids = token_windows(samples=8, seqlen=12)
    recipe = small_recipe(
        calibration_mode="sequential",
        beta=1.0,
        sequential_shrinkage=0.0,
        residual_correction=residual_correction,
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
        residual_OT = torch.zeros(len(weight_OI), compressed_IT.shape[1], dtype=torch.float64)
        if residual_correction:
            residual_OT += residual_correction * lost_in(models, name, ids)
        if bias_correction:
            bias_O = 0 if original.bias is None else original.bias.double().detach()
            outputs = layer.svd_u.weight @ (layer.svd_v.weight @ compressed_IT) + layer.svd_u.bias[:, None]
            wanted = weight_OI @ dense_IT + residual_OT + (bias_O[:, None] if isinstance(bias_O, Tensor) else 0)
            torch.testing.assert_close(outputs.mean(1).detach(), wanted.mean(1), rtol=1e-4, atol=1e-5)
            dense_IT = dense_IT - dense_IT.mean(1, keepdim=True)
            compressed_IT = compressed_IT - compressed_IT.mean(1, keepdim=True)
            residual_OT = residual_OT - residual_OT.mean(1, keepdim=True)
        target_OT = weight_OI @ dense_IT + residual_OT
        regression = torch.linalg.lstsq(compressed_IT.T, target_OT.T, driver="gelsd").solution.T @ compressed_IT
        rank = layer.svd_v.weight.shape[0]
        left, sigma, right = torch.linalg.svd(regression, full_matrices=False)
        best = ((target_OT - (left[:, :rank] * sigma[:rank]) @ right[:rank]) ** 2).sum()
        ours = ((target_OT - layer.svd_u.weight @ (layer.svd_v.weight @ compressed_IT)) ** 2).sum()
        assert ours <= best * 1.01 + 1e-9, name


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
        residual_correction=0.0,
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

    def spy(self: Any, block: Any, group: Any, *rest: Any) -> Any:
        products = products_of(self, block, group, *rest)
        found[group[0].name] = products.cloned()
        return products

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
            "compressed_II": compressed_IT @ compressed_IT.T,
        }
        if sums.difference_II.ndim:
            expected["difference_II"] = (dense_IT - compressed_IT) @ compressed_IT.T
        for product, wanted_II in expected.items():
            scale = expected["compressed_II"].norm()
            assert (getattr(sums, product) - wanted_II).norm() < 1e-4 * scale, (name, product)
