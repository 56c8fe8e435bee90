"""Experts as targets: their statistics, few tokens, one form for all or one for each, and whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from families import tiny_model, tiny_tokens
from runs import run, small_recipe, token_windows
from svdllm import InputError, plan, verify
from svdllm.checkpoint.report import read_report
from svdllm.compression import analyze, parts
from svdllm.compression.collect import collect_backward
from svdllm.compression.few_tokens import ExpertTokens, group_tokens, with_group_statistics
from svdllm.compression.math.statistics import Gram, MeanAbsolute
from svdllm.compression.ranks.pools import Pools, probed_members
from svdllm.compression.ranks.question import Evidence
from svdllm.models.discover import discover
from svdllm.models.low_rank.lowrank import SplitExperts
from svdllm.models.skeleton import build_skeleton
from svdllm.models.structure import Structure
from svdllm.models.walk import Block

OPTIONS: dict[str, dict[str, Any]] = {"gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2}}


def model_of(family: str) -> Any:
    return tiny_model(family, **OPTIONS.get(family, {}))


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_tokens(), use_cache=False).logits


def structure_of(family: str) -> Structure:
    return discover(build_skeleton(model_of(family).config))


def test_tokens_of_a_gram_have_weights() -> None:
    tokens, weights = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([0.5, 2.0])
    gram = Gram(2)
    gram.add(tokens, weights)
    # 0.25 (1, 2)(1, 2)^T + 4 (3, 0)(3, 0)^T; the mean is (0.25 (1, 2) + 4 (3, 0)) / 4.25.
    torch.testing.assert_close(gram.value(), torch.tensor([[36.25, 0.5], [0.5, 1.0]]).double())
    torch.testing.assert_close(gram.mean(), torch.tensor([12.25, 0.5]).double() / 4.25)
    scaled = Gram(2)
    scaled.add(tokens * weights[:, None])
    torch.testing.assert_close(gram.value(), scaled.value())


def test_an_expert_of_few_tokens_takes_a_part_of_its_group() -> None:
    structure = structure_of("mixtral")
    members = [t for t in structure.targets if t.pool == "model.layers.0.mlp.experts.down_proj"]
    width = members[0].in_features
    generator = torch.Generator().manual_seed(0)
    tokens = {t.name: torch.randn(3 + n, width, generator=generator) for n, t in enumerate(members[:3])}
    grams = {name: Gram(width) for name in tokens}
    for name, gram in grams.items():
        gram.add(tokens[name])
    mixed = with_group_statistics(structure.targets, grams)
    group = sum(x.double().mT @ x.double() for x in tokens.values()) / (3 + 4 + 5)
    assert set(mixed) == {t.name for t in members}  # of pools of which nothing is known, nothing is made
    for target in members[:3]:
        x = tokens[target.name].double()
        torch.testing.assert_close(
            mixed[target.name].value(), x.mT @ x + group_tokens(width) * group, atol=1e-4, rtol=1e-5
        )
    alone = mixed[members[3].name]
    assert (alone.num_tokens, alone.group_share) == (0, 1.0)
    torch.testing.assert_close(alone.value(), group_tokens(width) * group, atol=1e-4, rtol=1e-5)
    shares = [mixed[target.name].group_share for target in members]
    assert 1 > shares[0] > shares[1] > shares[2]


def test_means_of_experts_stay_means() -> None:
    structure = structure_of("mixtral")
    first, second, *_ = [t for t in structure.targets if t.pool == "model.layers.0.mlp.experts.down_proj"]
    means = {}
    for target, level in ((first, 1.0), (second, 3.0)):
        means[target.name] = MeanAbsolute(target.in_features)
        means[target.name].add(torch.full((10, target.in_features), level))
    mixed = with_group_statistics(structure.targets, means)[first.name]
    tokens = group_tokens(first.in_features)
    expected = (10 * 1.0 + tokens * 2.0) / (10 + tokens)
    torch.testing.assert_close(mixed.value(), torch.full((first.in_features,), expected).double())


def test_experts_are_counted_by_their_tokens() -> None:
    structure = structure_of("mixtral")
    names = list(dict.fromkeys(t.expert for t in structure.targets if t.expert and t.block == 0))
    known = ExpertTokens.of(dict(zip(names, [0, 3, 100, 200], strict=True)), structure.targets)
    assert known is not None
    assert (known.experts, known.without_tokens, known.mostly_from_group) == (4, [names[0]], 2)  # 32 features: 4 tokens
    assert (known.least, known.median) == (0, 100)
    assert ExpertTokens.of({}, structure.targets) is None


def test_a_pool_costs_and_loses_what_its_members_do() -> None:
    structure = structure_of("qwen3_moe")
    generator = torch.Generator().manual_seed(0)

    def energies(size: int) -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64).sort(descending=True).values

    evidence = Evidence(
        energies={t.name: energies(t.full_rank) for t in structure.targets},
        narrowings={mlp.name: energies(mlp.width + 1) for mlp in structure.mlps},
        probes={pool: {5: 2.0} for pool in structure.pools},
    )
    pools = Pools.of(structure.targets, structure)
    pool, members = next(iter(pools.targets.items()))
    summed = sum(evidence.energies[member.name] for member in members)
    torch.testing.assert_close(pools.known(evidence).energies[pool], summed)
    shared = probed_members(evidence, structure).probes
    own = torch.tensor([evidence.energies[member.name][5:].sum() for member in members])
    found = torch.tensor([shared[member.name][5] for member in members])
    torch.testing.assert_close(found, (2.0 * own / own.sum()).to(found.dtype))
    fixed = Pools.of([t for t in structure.targets if t.name != members[1].name], structure)
    assert members[1].expert not in {t.expert for targets in fixed.targets.values() for t in targets}
    assert len(fixed.targets[pool]) == len(members) - 1


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("mode", ["dense", "sequential"])
def test_at_full_rank_the_model_is_the_dense_one(family: str, mode: str, tmp_path: Path) -> None:
    model = model_of(family)
    result = run(model, tmp_path / "out", recipe=small_recipe(ranks={".": "full"}, calibration_mode=mode))
    made: Any = result.load(dtype=torch.float32).eval()
    assert not any(t.pool for t in result.plan.structure.targets if t.name not in result.plan.forms)
    torch.testing.assert_close(logits_of(made), logits_of(model), atol=1e-4, rtol=1e-4)
    assert made.num_parameters() == result.plan.params


@pytest.mark.parametrize("ranks", ["equal", "own"])
def test_the_preset_gives_one_form_to_a_layer_or_one_to_each_expert(ranks: str, tmp_path: Path) -> None:
    recipe = small_recipe(metric="two-sided", allocation="loss", ratio=0.4, round_to=1, expert_ranks=ranks)
    result = run(model_of("qwen3_moe"), tmp_path / "out", recipe=recipe)
    assert result.plan.achieved_ratio >= 0.4
    forms = {
        pool: {result.plan.forms.get(name) for name in names} for pool, names in result.plan.structure.pools.items()
    }
    of_linears = [chosen for pool, chosen in forms.items() if "+" not in pool]
    assert all(len(chosen) == 1 for chosen in of_linears) == (ranks == "equal")
    verify(tmp_path / "out", "cpu")
    counted = read_report(tmp_path / "out")["experts"]
    assert counted["experts"] == 8
    assert 0 <= counted["least"] <= counted["median"]


def test_a_narrower_mixture_is_exported_as_a_plain_model(tmp_path: Path) -> None:
    from svdllm.export.dense import export_dense

    recipe = small_recipe(ranks={"experts": {"narrow": 40}}, calibration_mode="dense")
    made: Any = run(model_of("gpt_oss"), tmp_path / "out", recipe=recipe).load(dtype=torch.float32)
    export_dense(tmp_path / "out", tmp_path / "plain")
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert type(plain).__name__ == "GptOssForCausalLM"
    assert plain.config.intermediate_size == 40
    torch.testing.assert_close(logits_of(plain), logits_of(made.eval()), atol=1e-5, rtol=1e-4)


def test_layers_whose_experts_stay_dense_stay_stacked(tmp_path: Path) -> None:
    model = model_of("mixtral")
    recipe = small_recipe(ranks={r"layers\.0\..*experts\.2\.down": 8, "q_proj": 8})
    made: Any = run(model, tmp_path / "out", recipe=recipe).load(dtype=torch.float32)
    modules = [type(layer.mlp.experts) for layer in made.model.layers]
    assert [issubclass(module, SplitExperts) for module in modules] == [True, False]
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "model.layers.0.mlp.experts.2.down_proj.svd_u.weight" in names
    assert "model.layers.0.mlp.experts.1.down_proj.weight" in names
    assert "model.layers.1.mlp.experts.down_proj" in names
    expected = model.model.layers[1].mlp.experts.down_proj
    torch.testing.assert_close(made.model.layers[1].mlp.experts.down_proj, expected, atol=0, rtol=0)
    verify(tmp_path / "out", "cpu")


def test_an_expert_without_tokens_is_fitted_to_those_of_its_layer(tmp_path: Path) -> None:
    model = model_of("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = 0
            layer.mlp.gate.weight[0] *= 0  # ties are broken in favour of the first
            layer.mlp.gate.weight[1] *= 0
            layer.mlp.gate.weight[2] *= 0
    result = run(model, tmp_path / "out", recipe=small_recipe(), ids=token_windows())
    counted = read_report(tmp_path / "out")["experts"]
    assert len(counted["without_tokens"]) == 4
    assert any("4 of 8 experts saw no calibration token" in warning for warning in result.warnings)
    verify(tmp_path / "out", "cpu")


def test_a_layer_without_a_token_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(self: Any, hidden: Tensor) -> Any:
        tokens = hidden.reshape(-1, hidden.shape[-1])
        absent = torch.full((len(tokens), 2), self.num_experts)
        return tokens.new_zeros(len(tokens), self.num_experts), tokens.new_zeros(len(tokens), 2), absent

    model = model_of("mixtral")
    monkeypatch.setattr(type(model.model.layers[0].mlp.gate), "forward", elsewhere)
    with pytest.raises(InputError, match=r"layers.0.mlp.experts.0.gate_up_proj.* saw no token; leave them dense"):
        run(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "mode"), [("qwen3_moe", "dense"), ("qwen3_moe", "sequential"), ("llama", "sequential")]
)
def test_a_block_is_done_in_parts(family: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every expert, or group of linears that read the same tensor, by itself."""
    model = model_of(family)
    recipe = small_recipe(metric="two-sided", allocation="loss", ratio=0.4, calibration_mode=mode)
    whole = run(model, tmp_path / "whole", recipe=recipe)
    monkeypatch.setattr(parts, "PART_BYTES", 1)
    monkeypatch.setattr(parts, "PART_BYTES_WITHOUT_EXPERTS", 1)
    walked: list[str] = []

    def collected(block: Block, *args: Any) -> Any:
        walked.append(block.name)
        return collect_backward(block, *args)

    monkeypatch.setattr(analyze, "collect_backward", collected)
    made = run(model, tmp_path / "parts", recipe=recipe)
    assert len(walked) >= 4 * len(set(walked))
    assert made.plan.forms == whole.plan.forms
    assert made.plan.peak_ram_bytes < whole.plan.peak_ram_bytes + 2**24
    torch.testing.assert_close(logits_of(made.load()), logits_of(whole.load()), atol=1e-4, rtol=1e-3)
    verify(tmp_path / "parts", "cpu")


def test_experts_are_divided_between_parts_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = structure_of("qwen3_moe").block_targets(0)
    depths = {target.name: 8 for target in targets}
    assert [part.targets for part in parts.parts_of(targets, depths)] == [targets]
    expert = [target for target in targets if target.expert]
    size = sum(parts.statistics_bytes(target, 8) for target in expert[:2])
    monkeypatch.setattr(parts, "PART_BYTES", 2 * size)
    found = parts.parts_of(targets, depths)
    assert [target for part in found for target in part.targets] == targets
    assert [part.is_last for part in found] == [False] * (len(found) - 1) + [True]
    assert list(found[0].grouped) == expert
    assert len({id(part.groups) for part in found}) == 1
    assert all(len(part.targets) <= 4 for part in found[1:])


def test_an_elastic_mixture_is_refused() -> None:
    with pytest.raises(InputError, match="--elastic cannot be used for MixtralForCausalLM: it is a mixture of experts"):
        plan(model_of("mixtral"), small_recipe(elastic=True))
