"""The reverse walk and the probes against the whole model with autograd, in float64."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from analysed import analysed, grams_by_autograd
from families import FAMILIES, tiny_model
from runs import run as compress_tiny
from runs import small_recipe, token_windows
from svdllm import NumericalError, Recipe
from svdllm.common.progress import Reporter
from svdllm.compression import probe as probing
from svdllm.compression.math.linalg import factorise
from svdllm.compression.probe import probe, probe_ids, probe_sizes, probe_tokens
from svdllm.compression.ranks import ALLOCATIONS
from svdllm.compression.ranks.loss import probe_rank
from svdllm.models.discover import discover
from svdllm.models.experts_on_disk import on_disk
from svdllm.models.skeleton import build_skeleton
from svdllm.models.structure import weight_of

ROUND_ROBIN = ("llama", "gpt2", "opt", "gemma3_text", "gemma4_text", "phi3", "gpt_neox")


@pytest.mark.parametrize("family", ROUND_ROBIN)
def test_two_sided_spectra_are_those_of_the_whole_models_gradients(family: str, tmp_path: Path):
    ids = token_windows(samples=5, seqlen=12)
    run = analysed(tiny_model(family), tmp_path, ids, metric="two-sided", gradient_samples=4, gradient_shrinkage=0.3)
    names = [target.name for target in run.structure.targets]
    oracle = grams_by_autograd(run.model, names, ids, ids[:4])
    for target in run.structure.targets:
        c_II, g_OO = oracle[target.name]
        metric_OO = 0.7 * g_OO / g_OO.diagonal().mean() + 0.3 * torch.eye(len(g_OO), dtype=torch.float64)
        values, vectors = torch.linalg.eigh(metric_OO)
        left_OO = vectors * values.sqrt() @ vectors.T
        values, vectors = torch.linalg.eigh(c_II)
        right_II = vectors * values.clamp_min(0).sqrt() @ vectors.T
        weight_OI = weight_of(run.model, target)
        sigma = torch.linalg.svdvals(left_OO @ weight_OI @ right_II)
        spectrum = run.analysis.spectrum(target)
        scale = float(sigma[0]) ** 2
        # the input Grams wait in float32 for the reverse walk
        torch.testing.assert_close(spectrum.energies_K / scale, sigma**2 / scale, rtol=1e-6, atol=1e-6)
        rank = probe_rank(target)
        u_OR, v_RI = factorise(weight_OI, spectrum, rank)
        loss = torch.linalg.matrix_norm(left_OO @ (weight_OI - u_OR @ v_RI) @ right_II) ** 2
        torch.testing.assert_close(loss / scale, (sigma[rank:] ** 2).sum() / scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ROUND_ROBIN)
def test_fisher_weights_are_those_of_the_whole_models_gradients(family: str, tmp_path: Path):
    """FWSVD: the gradient of every window's loss in every weight, by autograd, window by window."""
    ids = token_windows(samples=5, seqlen=12)
    run = analysed(tiny_model(family), tmp_path, ids, method="fwsvd", gradient_samples=3)
    model = run.model.double().requires_grad_(True)
    squares = {target.name: 0.0 for target in run.structure.targets}
    for window in ids[:4, None]:  # two batches
        logits = model(input_ids=window, use_cache=False).logits[0, :-1]
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").backward()
        for target in run.structure.targets:
            gradient = model.get_submodule(target.name).weight.grad
            squares[target.name] += (gradient.T if target.is_conv1d else gradient).pow(2).sum(1)
    for target in run.structure.targets:
        weight_OI = weight_of(run.model, target).double()
        fisher_O = squares[target.name]
        fisher_O[fisher_O == 0] = fisher_O[fisher_O > 0].min()  # rows that a ReLU keeps silent
        fisher_O = fisher_O / fisher_O.mean()
        sigma = torch.linalg.svdvals(fisher_O.sqrt()[:, None] * weight_OI)
        torch.testing.assert_close(run.analysis.energies(target).double(), sigma**2, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("gradient_samples", "walked"), [(1, 2), (2, 2), (3, 4), (4, 4), (100, 5)])
def test_a_run_follows_back_whole_batches_of_the_first_windows(gradient_samples: int, walked: int, tmp_path: Path):
    """Five windows in batches of two: the fewest that hold the samples that are asked for, in a whole run."""
    ids, model = token_windows(samples=5, seqlen=12), tiny_model("llama").double()
    recipe = small_recipe(
        metric="two-sided", gradient_samples=gradient_samples, gradient_shrinkage=0.3, input_only=(), dtype="float64",
        seqlen=12, samples=5, batch_tokens=24,
    )  # fmt: skip
    result = compress_tiny(model, tmp_path / "out", ids=ids, recipe=recipe)
    oracle = grams_by_autograd(model, [row.name for row in result.linears], ids, ids[:walked])
    for row in result.linears:
        c_II, g_OO = oracle[row.name]
        metric_OO = 0.7 * g_OO / g_OO.diagonal().mean() + 0.3 * torch.eye(len(g_OO), dtype=torch.float64)
        values, vectors = torch.linalg.eigh(c_II)
        right_II = vectors * values.clamp_min(0).sqrt() @ vectors.T
        weight_OI = model.get_submodule(row.name).weight.detach()
        sigma = torch.linalg.svdvals(torch.linalg.cholesky(metric_OO).mT @ weight_OI @ right_II)
        assert row.loss == pytest.approx(float(sigma[row.rank :].norm()), rel=1e-5), row.name


def test_input_only_linears_keep_the_metric_of_their_inputs(tmp_path: Path):
    ids = token_windows(samples=4, seqlen=12)
    two_sided = analysed(tiny_model("llama"), tmp_path / "a", ids, metric="two-sided", input_only=("q_proj",))
    plain = analysed(tiny_model("llama"), tmp_path / "b", ids, metric="input")
    for target in plain.structure.targets:
        same = torch.allclose(two_sided.analysis.energies(target), plain.analysis.energies(target), rtol=1e-5)
        assert same == target.name.endswith("q_proj"), target.name


def test_shrinkage_mixes_in_the_diagonal(tmp_path: Path):
    ids = token_windows(samples=4, seqlen=12)
    run = analysed(tiny_model("llama"), tmp_path, ids, metric="input", shrinkage=0.25)
    target = run.structure.targets[0]
    c_II, _ = grams_by_autograd(run.model, [target.name], ids, ids)[target.name]
    weight_OI = weight_of(run.model, target)
    shrunk_II = 0.75 * c_II + 0.25 * torch.diag(c_II.diagonal())
    expected = torch.linalg.eigvalsh(weight_OI @ shrunk_II @ weight_OI.T).flip(0)
    torch.testing.assert_close(run.analysis.energies(target), expected)


@pytest.mark.parametrize(
    ("family", "joint_kv"), [*((family, False) for family in ROUND_ROBIN), ("llama", True), ("qwen2", True)]
)
def test_a_probe_is_the_divergence_of_the_whole_model_with_one_truncated_linear(
    family: str, joint_kv: bool, tmp_path: Path
):
    ids = token_windows(samples=4, seqlen=12)
    run = analysed(tiny_model(family), tmp_path, ids, metric="input", joint_kv=joint_kv)
    probed, probes = probe_ids(ids, 20), probed_on(run, probe_ids(ids, 20))
    with torch.no_grad():
        dense = run.model(input_ids=probed, use_cache=False).logits.log_softmax(-1)
    for target in run.structure.targets:
        ((rank, divergence),) = probes[target.name].items()
        assert rank == probe_rank(target)
        other = truncated_logits(run, target, rank, probed).log_softmax(-1)
        expected = (dense.exp() * (dense - other)).sum(-1).mean()
        assert divergence == pytest.approx(float(expected), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("method", ["svd-llm", "asvd", "svd", "fwsvd"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_a_probe_for_strs_is_the_loss_of_the_whole_model_with_one_truncated_linear(
    family: str, method: str, tmp_path: Path
):
    ids = token_windows(samples=4, seqlen=12)
    settings = {"allocation": "strs", "strs_ratios": (0.8, 0.1, 0.4), "metric": "input", "method": method}
    run = analysed(tiny_model(family), tmp_path, ids, **settings)
    probed, probes = probe_ids(ids, 24), probed_on(run, probe_ids(ids, 24))
    assert probed.shape == (2, 12)
    assert list(probes) == [target.name for target in run.structure.targets]
    for target in run.structure.targets:
        dense = target.num_weights / (target.in_features + target.out_features)
        assert list(probes[target.name]) == [int(share * dense + 1e-9) for share in (0.2, 0.6, 0.9)]
        for rank, loss in probes[target.name].items():
            logits = truncated_logits(run, target, rank, probed)[:, :-1]
            expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), probed[:, 1:].flatten())
            assert loss == pytest.approx(float(expected), rel=1e-6)
    assert len({loss for losses in probes.values() for loss in losses.values()}) == 3 * len(probes)


def test_probing_leaves_the_walk_dense(tmp_path: Path):
    ids = token_windows(samples=2, seqlen=12)
    run = analysed(tiny_model("llama"), tmp_path, ids, metric="input", allocation="strs")
    probed_on(run, ids)
    with torch.no_grad():
        torch.testing.assert_close(run.walk.logits(), run.model(input_ids=ids).logits.float())


def test_probe_streams_in_files_give_the_same_probes(tmp_path: Path):
    ids = token_windows(samples=2, seqlen=12)
    run = analysed(tiny_model("llama"), tmp_path, ids, metric="input", allocation="strs")
    in_memory = probed_on(run, ids)
    streams = tmp_path / "streams"
    streams.mkdir()
    made: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probing, "on_disk", lambda tensor, folder: made.append(folder) or on_disk(tensor, folder))
        assert probed_on(run, ids, streams) == in_memory
    assert streams in made
    assert not list(streams.iterdir())


def probed_on(run: SimpleNamespace, ids: Tensor, folder: Path | None = None) -> Any:
    run.walk.ids, run.walk.kept_batches, run.walk.batch_tokens = ids, 0, ids.numel()
    row = ALLOCATIONS[run.recipe.allocation].probing
    assert row is not None
    return probe(run.walk, run.analysis, probe_sizes(run.recipe, run.structure), row.measure, Reporter(), folder)


def truncated_logits(run: SimpleNamespace, target: Any, rank: int, ids: Tensor) -> Tensor:
    """Of the whole model with one linear's weight multiplied out of its factors."""
    weights = [run.model.get_submodule(name).weight for name in target.linears]
    weight_OI = weight_of(run.model, target)
    u_OR, v_RI = factorise(weight_OI, run.analysis.spectrum(target), rank)
    kept = [weight.detach().clone() for weight in weights]
    rows = (u_OR @ v_RI).split([weight.shape[1 if target.is_conv1d else 0] for weight in weights])
    with torch.no_grad():
        for weight, product_OI in zip(weights, rows, strict=True):
            weight.copy_(product_OI.T if target.is_conv1d else product_OI)
        logits = run.model(input_ids=ids, use_cache=False).logits
        for weight, dense in zip(weights, kept, strict=True):
            weight.copy_(dense)
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_walks_backward(family: str, tmp_path: Path):
    run = analysed(tiny_model(family), tmp_path, token_windows(samples=2, seqlen=10), metric="two-sided")
    for target in run.structure.targets:
        spectrum = run.analysis.spectrum(target)
        assert (spectrum.dual_DO is None) != (spectrum.rows_DI is None)


def test_probe_windows_are_beginnings_spread_over_the_text():
    ids = torch.arange(10 * 300).view(10, 300)
    chosen = probe_ids(ids, 5 * 256)
    assert chosen.shape == (5, 256)
    assert chosen[:, 0].tolist() == [0, 600, 1200, 1800, 2400]
    assert probe_ids(ids, 100).shape == (1, 100)
    assert probe_ids(ids, 10**6).shape == (10, 256)


def test_probing_is_the_asked_share_of_the_work():
    skeleton = build_skeleton(tiny_model("llama").config)
    structure = discover(skeleton)
    half, quarter = (
        probe_tokens(Recipe(ratio=0.5, probe_share=share, samples=256, seqlen=64), structure, skeleton)
        for share in (0.5, 0.25)
    )
    weights = [target.num_weights for target in structure.targets]
    grams = sum(width**2 for width in (32, 32, 32, 48)) * 2 / 2
    work = 256 * 64 * (sum(weights) + grams)
    per_token = 7 * (sum(weights) + sum(weights) / 2) + 14 * 128 * 32
    with_mlps = per_token * 8 / 7  # an MLP of every block, beside its seven linears
    assert half == int(work / with_mlps)
    assert quarter == int(work / 3 / with_mlps)
    pairs = Recipe(ratio=0.5, probe_share=0.5, samples=256, seqlen=64, forms=("pair",))
    assert probe_tokens(pairs, structure, skeleton) == int(work / per_token)
    strs = Recipe(ratio=0.5, allocation="strs", strs_ratios=(0.2, 0.5, 0.7), round_to=1, samples=256, seqlen=64)
    assert probe_tokens(strs, structure, skeleton) == int(work / 3 / per_token)
    plain = Recipe(ratio=0.5, method="svd", allocation="strs", strs_ratios=(0.5,), samples=256, seqlen=64)
    assert probe_tokens(plain, structure, skeleton) == int(256 * 64 * sum(weights) / per_token)


def test_a_gradient_that_is_not_finite_names_its_block(tmp_path: Path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(0)
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(NumericalError, match="gradient at the last block"):
        analysed(model, tmp_path, token_windows(samples=2, seqlen=8), metric="two-sided")
