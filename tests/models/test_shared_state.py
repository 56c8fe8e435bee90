"""Keys and values that layers share: one state for every stream and batch, and what cannot be carried is refused."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import tiny_model, tiny_tokens
from runs import walk_of
from svdllm import UnsupportedModelError
from svdllm.models.discover import discover
from svdllm.models.shared_state import Handed, Ports, SharedStates, StateGradients, WrittenArguments, differentiable
from svdllm.models.skeleton import build_skeleton
from svdllm.models.stubs import Recorder
from svdllm.models.walk import Walk


def walk_through(model: Any, ids: Tensor, **settings: Any) -> Walk:
    walk = walk_of(model, ids, **settings)
    for block in walk.blocks():
        block.run()
    return walk


def test_the_shared_state_is_found_and_measured() -> None:
    structure = discover(build_skeleton(tiny_model("gemma4_text").config))
    assert structure.shared_arguments == ("shared_kv_states",)
    # Keys and values, of a layer with a window and of one without, two heads of eight features.
    assert structure.shared_features == 2 * 2 * 2 * 8
    assert discover(build_skeleton(tiny_model("gemma3_text").config)).shared_features == 0


@pytest.mark.parametrize("spilled", [False, True])
def test_every_batch_has_keys_and_values_of_its_own(spilled: bool, tmp_path: Path) -> None:
    model, ids = tiny_model("gemma4_text"), tiny_tokens(5, 12)
    walk = walk_through(model, ids, spill_file=tmp_path / "states" if spilled else None)
    assert len(list(tmp_path.iterdir())) == (
        1 + 3 * 4 if spilled else 0
    )  # three batches, keys and values of two layers
    with torch.no_grad():
        torch.testing.assert_close(walk.logits(), model(input_ids=ids, use_cache=False).logits)
    walk.close()
    assert not list(tmp_path.iterdir())


def test_a_block_finds_what_earlier_blocks_wrote_last() -> None:
    states, entry = SharedStates(), ("kv", "full")
    states.write(0, 1, {entry: "first"})
    states.write(0, 3, {entry: "second"})
    states.write(1, 1, {entry: "of the other batch"})
    assert [states.before(0, block) for block in (0, 1, 2, 3, 4)] == [
        {},
        {},
        {entry: "first"},
        {entry: "first"},
        {entry: "second"},
    ]
    assert states.before(1, 5) == {entry: "of the other batch"}


class Block(nn.Module):
    """A linear whose input depends on what an earlier block left in the mapping."""

    def __init__(self, index: int):
        super().__init__()
        self.index, self.linear = index, nn.Linear(4, 4, bias=False)

    def forward(self, hidden: Tensor, store: Any) -> Tensor:
        key, value = store.get("kv", (hidden, hidden))
        made = self.linear(torch.tanh(hidden + key) * value)
        if self.index in (0, 2):  # block 2 writes over what block 0 wrote, from what it read
            store["kv"] = (made * 2, value + made)
        return hidden + made


class Decoder(nn.Module):
    def __init__(self, mapping: type):
        super().__init__()
        self.layers, self.mapping = nn.ModuleList(Block(index) for index in range(4)), mapping

    def forward(self, hidden: Tensor) -> Tensor:
        store = self.mapping()
        for layer in self.layers:
            hidden = layer(hidden, store)
        return hidden


@pytest.mark.parametrize("mapping", [dict, UserDict])
def test_gradients_through_entries_that_are_read_and_written_over(mapping: type) -> None:
    """Against autograd through the whole, which keeps every version of the mapping by itself."""
    torch.manual_seed(0)
    model = Decoder(mapping).double()
    hidden, gradient = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double()
    wanted = torch.autograd.grad(model(hidden), list(model.parameters()), gradient)

    recorders = [Recorder(layer, 0, ports=Ports(shared=(0,))) for layer in model.layers]
    blocks, model.layers = list(model.layers), nn.ModuleList(recorders)
    model(hidden)
    states, inputs = SharedStates(), []
    for index, block in enumerate(blocks):
        inputs.append(hidden)
        with torch.no_grad():
            hidden, written = recorders[index].call.run(block, hidden, states.before(0, index))
        states.write(0, index, written)
    assert [states.before(0, index).keys() for index in range(4)] == [set(), *[{(0, "kv")}] * 3]
    gradients = StateGradients()
    for index in reversed(range(4)):
        leaf = inputs[index].clone().requires_grad_()
        found = differentiable(states.before(0, index), leaf.device)
        output, written = recorders[index].call.run(blocks[index], leaf, found)
        pairs = [(output, gradient), *gradients.of_written(0, written)]
        torch.autograd.backward([made for made, _ in pairs], [gradient for _, gradient in pairs])
        gradients.step_back(0, found, written)
        gradient = leaf.grad
    for block, expected in zip(blocks, wanted, strict=True):
        torch.testing.assert_close(block.linear.weight.grad, expected)


def watched(*blocks: Any, argument: Any) -> None:
    arguments = WrittenArguments("Toy", 3)
    hidden = torch.zeros(1, 3, 4)
    for index, block in enumerate(blocks):
        arguments.watch(f"layers.{index}", block, (hidden,), {"extra": argument}, lambda value: value)


def writes_nothing(hidden: Tensor, extra: Any) -> Tensor:
    return hidden + 1


def appends(hidden: Tensor, extra: Any) -> Tensor:
    extra.append(hidden)
    return hidden


def adds_in_place(hidden: Tensor, extra: Any) -> Tensor:
    extra += 1
    return hidden


def sets_an_attribute(hidden: Tensor, extra: Any) -> Tensor:
    extra.seen = hidden
    return hidden


def changes_its_input(hidden: Tensor, extra: Any) -> Tensor:
    return hidden.add_(1)


def empties(hidden: Tensor, extra: Any) -> Tensor:
    extra.clear()
    return hidden


def counts(hidden: Tensor, extra: Any) -> Tensor:
    extra["calls"] = 1
    return hidden


class Holder:
    pass


@pytest.mark.parametrize(
    ("block", "argument", "message"),
    [
        (appends, [], r"layers\.0 changes its argument 'extra' \(list\) in place"),
        (adds_in_place, torch.zeros(2), r"layers\.0 changes its argument 'extra' \(Tensor\) in place"),
        (sets_an_attribute, Holder(), r"layers\.0 changes its argument 'extra' \(Holder\) in place"),
        (changes_its_input, None, r"layers\.0 changes its hidden states \(Tensor\) in place"),
        (counts, {}, r"layers\.0 writes something else than tensors into its argument 'extra'"),
    ],
)
def test_what_cannot_be_carried_is_refused(block: Any, argument: Any, message: str) -> None:
    watched(writes_nothing, writes_nothing, argument=argument)
    with pytest.raises(UnsupportedModelError, match=f"Toy is not supported: {message}"):
        watched(block, argument=argument)


def test_an_output_that_a_later_block_takes_is_noted() -> None:
    arguments, hidden, extra = WrittenArguments("Toy", 3), torch.zeros(1, 3, 4), torch.zeros(1, 3, 2)
    arguments.watch("layers.0", lambda x: (x, None, extra), (hidden,), {}, lambda value: value)
    arguments.watch("layers.1", lambda x, y: (x, y), (hidden, extra), {}, lambda value: value)
    arguments.watch("layers.2", lambda x, z: (x,), (hidden,), {"z": extra}, lambda value: value)
    assert arguments.handed == [Handed("layers.0", 2, "layers.1", 0), Handed("layers.1", 1, "layers.2", "z")]
    assert arguments.num_features == 4  # both are kept
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.3 is handed an output of layers\.1 inside its argument 0"
    ):
        arguments.watch("layers.3", lambda x, y: (x,), (hidden, [extra]), {}, lambda value: value)


def test_hidden_states_that_change_between_blocks_are_refused() -> None:
    skeleton = build_skeleton(tiny_model("rwkv", rescale_every=0).config)
    assert discover(skeleton).num_outputs == (3, 3)
    skeleton.config.rescale_every = 1  # they are halved behind every block
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1 is not handed the hidden states as .*0 returned them"):
        discover(skeleton)


def test_a_block_that_runs_twice_is_refused() -> None:
    skeleton = build_skeleton(tiny_model("llama").config)
    once = skeleton.model.forward
    skeleton.model.forward = lambda **inputs: (once(**inputs), once(**inputs))[1]  # a model of recurrent depth
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0 runs more than once in one pass"):
        discover(skeleton)


def test_entries_that_are_removed_and_mappings_of_single_blocks_are_refused() -> None:
    def writes(hidden: Tensor, extra: Any) -> Tensor:
        extra["kv"] = hidden + 1
        return hidden

    arguments, hidden, store = WrittenArguments("Toy", 3), torch.zeros(1, 3, 4), {}
    arguments.watch("layers.0", writes, (hidden,), {"extra": store}, lambda value: value)
    assert (arguments.names, arguments.num_features) == (("extra",), 4)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1 removes entries from its argument 'extra'"):
        arguments.watch("layers.1", empties, (hidden,), {"extra": store}, lambda value: value)
    with pytest.raises(UnsupportedModelError, match=r"layers\.2 gets a mapping of its own in argument 'extra'"):
        arguments.watch("layers.2", writes, (hidden,), {"extra": {}}, lambda value: value)
