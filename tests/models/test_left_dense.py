"""Models with experts, state spaces and convolutions: files are read, and blocks walked, as transformers does both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import HYBRIDS, MIXTURES, tiny_model, tiny_tokens
from runs import walk_of
from svdllm.common.errors import UnsupportedModelError
from svdllm.compression.collect import collect_statistics
from svdllm.compression.few_tokens import GroupStatistic
from svdllm.compression.math.metrics import METHODS
from svdllm.compression.parts import Part
from svdllm.models.discover import discover, discover_blocks
from svdllm.models.low_rank.lowrank import split_experts
from svdllm.models.skeleton import build_skeleton
from svdllm.models.weights import SafetensorsWeights

KINDS = [*MIXTURES, *HYBRIDS, "falcon_h1", "gemma4_text"]


@pytest.mark.parametrize("family", KINDS)
def test_files_give_the_tensors_of_the_model(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)  # in the layout of the hub: experts one by one, for instance
    weights = SafetensorsWeights(tmp_path, build_skeleton(model.config))
    split_experts(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name in weights.names()}
    tied = set(model.state_dict()) - set(state)
    assert tied <= set(model.all_tied_weights_keys or ())
    for name, tensor in state.items():
        assert weights.shape_and_dtype(name) == (tuple(tensor.shape), tensor.dtype)
        torch.testing.assert_close(weights.get(name), tensor, atol=0, rtol=0, msg=name)


def test_experts_that_do_not_fit_the_rule_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.experts.1.up_proj.weight"] = torch.zeros(7, 32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UnsupportedModelError, match="do not fit the rules by which transformers joins those of Qwen3Moe"
    ):
        SafetensorsWeights(tmp_path, build_skeleton(model.config))


@pytest.mark.parametrize("family", KINDS)
def test_the_walk_computes_what_the_model_does(family: str) -> None:
    model, ids = tiny_model(family), tiny_tokens(3)
    inputs: dict[str, Tensor] = {}

    def count(name: str, expert: str | None) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            tokens = args[0].reshape(-1, args[0].shape[-1]).double()
            tokens = tokens if expert is None else tokens * weights[expert].double()[:, None]
            inputs[name] = inputs.get(name, 0) + tokens.mT @ tokens

        return hook

    walk = walk_of(model, ids)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    split_experts(model)
    weights: dict[str, Tensor] = {}
    for name in {target.expert for target in walk.structure.targets} - {None}:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: weights.update({name: args[1]}))
    for target in walk.structure.targets:
        model.get_submodule(target.name).register_forward_pre_hook(count(target.name, target.expert))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
    for block in walk.blocks():
        targets = walk.structure.block_targets(block.index)
        statistics = collect_statistics(block, Part(targets=targets), METHODS["svd-llm"])
        for name, gram in statistics.items():
            own = gram.own if isinstance(gram, GroupStatistic) else gram
            assert (own is None) == (name not in inputs)
            if own is not None:
                torch.testing.assert_close(own.value(), inputs[name], atol=1e-4, rtol=1e-4, msg=name)
    torch.testing.assert_close(walk.logits(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", KINDS)
def test_the_reverse_walk_gives_the_gradient_of_the_model(family: str, tmp_path: Path) -> None:
    model, ids = tiny_model(family).requires_grad_(False), tiny_tokens(3)
    walk = walk_of(model, ids, kept_folder=tmp_path, kept_batches=2)
    first: list[Tensor] = []

    def begin(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first.append((args[0] if args else kwargs["hidden_states"]).detach().requires_grad_())
        return ((first[0], *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": first[0]})

    model.get_submodule(walk.structure.blocks[0]).register_forward_pre_hook(begin, with_kwargs=True)
    logits = model(input_ids=ids, use_cache=False).logits
    wanted = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (expected,) = torch.autograd.grad((logits * wanted).sum(), first)
    for block in walk.blocks():
        block.run()
    for block in walk.reversed_blocks(lambda windows, logits: wanted[windows]):
        block.run_backward()
    expected = expected.movedim(walk.structure.batch_dim, 0)
    scale = expected.abs().max()
    torch.testing.assert_close(walk.hidden.tensor / scale, expected / scale, atol=1e-4, rtol=1e-3)


def test_a_walk_needs_no_targets() -> None:
    skeleton = build_skeleton(tiny_model("bart").config)
    blocks, whole = discover_blocks(skeleton), discover(skeleton)
    assert blocks.targets == ()
    assert (blocks.blocks, blocks.num_outputs) == (whole.blocks, whole.num_outputs)
