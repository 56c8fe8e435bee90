"""Each method of pruning against a direct implementation that runs the whole model and shares no code."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import tiny_model, tiny_tokens
from runs import token_windows
from svdllm import Pruning, load_model, prune
from svdllm.checkpoint.report import read_report
from svdllm.models.channels import Channels
from svdllm.pruning.flap import Moments, best_groups, fluctuations, group_scores, standardised
from svdllm.pruning.llm_pruner import pruned_blocks

HEADS, NEURONS, WIDTH = 2, 48, 16  # groups of tiny llama: heads of keys and values, neurons; columns of a head


def made(model: Any, method: str, ratio: float, folder: Path) -> Any:
    prune(
        model,
        Pruning(pruning=method, ratio=ratio, samples=8, seqlen=16, batch_tokens=32),
        folder,
        calibration=token_windows(),
    )
    return load_model(folder)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_tokens(), use_cache=False).logits


def inputs_of(model: Any, names: list[str]) -> dict[str, Tensor]:
    """Inputs of modules on the calibration text (tokens x features)."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: found[name].append(args[0]))
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=token_windows(), use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).flatten(0, 1).double() for name, parts in found.items()}


def test_flap_scores_of_a_case_worked_out_by_hand() -> None:
    moments = Moments()
    moments.add(torch.tensor([[1.0, 0.0, 2.0]]))
    moments.add(torch.tensor([[[3.0, 0.0, 2.0], [5.0, 3.0, 2.0]]]))
    torch.testing.assert_close(moments.mean, torch.tensor([3.0, 1.0, 2.0]).double())
    torch.testing.assert_close(moments.variance, torch.tensor([8 / 3, 2.0, 0.0]).double())
    weight = torch.tensor([[1.0, 2.0, 9.0], [0.0, 1.0, 9.0], [1.0, 2.0, 9.0]])
    scores = fluctuations(weight, moments.variance)
    torch.testing.assert_close(scores, torch.tensor([16 / 3, 18.0, 0.0]).double())
    of_the_layer = standardised(torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(of_the_layer, torch.tensor([-1.0, 0.0, 1.0]))
    heads = Channels(name="a", block=0, are_heads=True, producers={}, consumer="o", columns=torch.tensor([0, 0, 1, 1]))
    squares = torch.tensor([1.0, 1.0, 4.0, 16.0])
    expected = ((squares - 5.5) / squares.std()).view(2, 2).mean(1)
    torch.testing.assert_close(group_scores(heads, torch.tensor([1.0, 1.0, 2.0, 4.0])), expected)


def test_flap_keeps_the_best_of_all_layers_that_fit() -> None:
    owners = torch.arange(3)
    pair = [
        Channels(name=name, block=0, are_heads=False, producers={}, consumer=name, columns=owners)
        for name in ("a", "b")
    ]
    scores = {"a": torch.tensor([5.0, 4.0, 3.0]), "b": torch.tensor([-1.0, 1.0, 3.5])}
    kept = best_groups(pair, scores, {"a": 2, "b": 1}, 6)
    assert {name: mask.tolist() for name, mask in kept.items()} == {
        "a": [True, True, False],
        "b": [False, False, True],
    }


def flap_reference(model: Any, ratio: float) -> tuple[Any, dict[str, list[int]]]:
    """The dense model with zeros for what FLAP removes and biases for its mean; and the removed columns."""
    layers = range(model.config.num_hidden_layers)
    names = [f"model.layers.{n}.{leaf}" for n in layers for leaf in ("self_attn.o_proj", "mlp.down_proj")]
    inputs = inputs_of(model, names)
    ranked, total = [], 0
    for name in names:
        weight, x = model.get_submodule(name).weight.double(), inputs[name]
        score = (x - x.mean(0)).square().mean(0) * weight.square().sum(0)
        score = score.square() if "o_proj" in name else score
        score = (score - score.mean()) / score.std()
        size, price = (WIDTH, WIDTH * 32 * 2 + 2 * 8 * 32) if "o_proj" in name else (1, 3 * 32)
        for group, value in enumerate(score.view(-1, size).mean(1).tolist()):
            ranked.append((value, name, range(group * size, (group + 1) * size), price))
            total += price
    best = {name: max((entry for entry in ranked if entry[1] == name), key=lambda entry: entry[0]) for name in names}
    ranked.sort(key=lambda entry: entry not in best.values())  # the best of each stay
    ranked = ranked[: len(best)] + sorted(ranked[len(best) :], key=lambda entry: -entry[0])
    left, removed, cut = (1 - ratio) * total, {name: [] for name in names}, False
    for _, name, columns, price in ranked:
        left -= price
        cut = cut or left < 0
        if cut:
            removed[name] += list(columns)
    pruned = copy.deepcopy(model)
    for name, columns in removed.items():
        linear = pruned.get_submodule(name)
        bias = linear.weight[:, columns].double() @ inputs[name].mean(0)[columns]
        linear.bias = torch.nn.Parameter(bias.float())
        linear.weight.data[:, columns] = 0
    return pruned, removed


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_flap_is_what_a_direct_implementation_makes(ratio: float, tmp_path: Path) -> None:
    model = tiny_model("llama")
    pruned, removed = flap_reference(model, ratio)
    found = made(model, "flap", ratio, tmp_path / "out")
    for name, columns in removed.items():
        assert found.get_submodule(name).in_features == model.get_submodule(name).in_features - len(columns)
    torch.testing.assert_close(logits(found), logits(pruned), rtol=1e-4, atol=1e-5)


def test_llm_pruner_keeps_what_changes_the_loss_most(tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    ids = token_windows()
    model.requires_grad_(True)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found = made(copy.deepcopy(model).requires_grad_(False), "llm-pruner", 0.3, tmp_path / "out")
    assert list(pruned_blocks(4)) == [1, 2]
    assert list(pruned_blocks(32)) == list(range(4, 30))
    reference = copy.deepcopy(model)
    for n in range(4):
        layer, other = model.model.layers[n], found.model.layers[n]
        mlp = {leaf: getattr(layer.mlp, leaf).weight for leaf in ("gate_proj", "up_proj", "down_proj")}
        effect = {leaf: (weight * weight.grad).abs().double() for leaf, weight in mlp.items()}
        neurons = effect["gate_proj"].sum(1) + effect["up_proj"].sum(1) + effect["down_proj"].sum(0)
        qkvo = {leaf: getattr(layer.self_attn, leaf).weight for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")}
        effect = {leaf: (weight * weight.grad).abs().double() for leaf, weight in qkvo.items()}
        heads = sum(effect[leaf].sum(1).view(HEADS, -1).sum(1) for leaf in ("q_proj", "k_proj", "v_proj"))
        heads = heads + effect["o_proj"].sum(0).view(HEADS, -1).sum(1)
        kept_neurons = other.mlp.down_proj.in_features
        kept_heads = other.self_attn.o_proj.in_features // WIDTH
        assert (kept_neurons < NEURONS, kept_heads) == ((True, 1) if n in (1, 2) else (False, HEADS))
        gone = neurons.topk(NEURONS - kept_neurons, largest=False).indices
        reference.model.layers[n].mlp.down_proj.weight.data[:, gone] = 0
        for head in heads.topk(HEADS - kept_heads, largest=False).indices.tolist():
            reference.model.layers[n].self_attn.o_proj.weight.data[:, head * WIDTH : (head + 1) * WIDTH] = 0
    torch.testing.assert_close(logits(found), logits(reference), rtol=1e-4, atol=1e-5)


def test_block_pruner_removes_what_brute_force_does(tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    ids = token_windows()

    def without(names: list[str]) -> Any:
        other = copy.deepcopy(model)
        for name in names:
            writer = "o_proj" if "attn" in name else "down_proj"
            other.get_submodule(f"{name}.{writer}").weight.data.zero_()
        return other

    def loss(names: list[str]) -> float:
        with torch.no_grad():
            return float(without(names)(input_ids=ids, labels=ids, use_cache=False).loss)

    branches = [f"model.layers.{n}.{leaf}" for n in range(3) for leaf in ("self_attn", "mlp")]
    sizes = {name: 3 * 32 * 48 if "mlp" in name else 2 * 32 * 32 + 2 * 16 * 32 for name in branches}
    removed: list[str] = []
    losses = []
    while sum(sizes[name] for name in removed) < 0.5 * sum(sizes.values()):
        left = {name: loss([*removed, name]) for name in branches if name not in removed}
        removed.append(min(left, key=lambda name: left[name]))
        losses.append(left[removed[-1]])
    found = made(model, "blockpruner", 0.5, tmp_path / "out")
    rounds = read_report(tmp_path / "out")["pruning"]["rounds"]
    assert [row["removed"] for row in rounds] == removed
    assert [row["nll"] for row in rounds] == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(logits(found), logits(without(removed)), rtol=1e-4, atol=1e-5)


def test_a_dropped_first_attention_keeps_the_length_of_the_cache(tmp_path: Path, monkeypatch: Any) -> None:
    from svdllm.pruning import block_pruner

    losses = block_pruner.losses_without

    def first_attention_last(*args: Any) -> dict[str, float]:
        return {name: loss - 99 * name.endswith("0.self_attn") for name, loss in losses(*args).items()}

    monkeypatch.setattr(block_pruner, "losses_without", first_attention_last)
    found = made(tiny_model("llama"), "blockpruner", 0.1, tmp_path / "out")
    assert not list(found.model.layers[0].self_attn.parameters())
    ids = tiny_tokens()
    with torch.no_grad():
        first = found(input_ids=ids[:, :7], use_cache=True)
        assert first.past_key_values.get_seq_length() == 7
        second = found(input_ids=ids[:, 7:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, logits(found)[:, 7:], rtol=1e-4, atol=1e-5)
