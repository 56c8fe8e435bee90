"""Finds the MLPs whose inner features can be removed: linears whose outputs, feature by feature, feed one linear.

Gated (``down(act(gate(x)) * up(x))``), plain (``fc2(act(fc1(x)))``) and fused (gate and up in one linear) MLPs are told
by what the block does, not by its names. In a trial run every linear returns random outputs, so no weight is needed.
The *producers* of a linear, its *consumer*, are the linears whose outputs its input depends on. Then the block is run
again with producers that return a subset of these features, in another order. The input of the consumer must be the
same subset, and nothing else may change. A norm over the inner features and attention fail.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from svdllm.models.experts import distinct_modules, experts_tried
from svdllm.models.hooks import experts_computed, first_argument, replaced
from svdllm.models.linears import is_linear, linear_shape
from svdllm.models.low_rank.lowrank import SplitExperts
from svdllm.models.skeleton import LARGE
from svdllm.models.structure import Mlp, Structure
from svdllm.models.stubs import BlockStub

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a block's call, by position and by keyword


class Found(NamedTuple):
    """Producers and consumer by their names in the block, and whether fused producers are interleaved."""

    producers: tuple[str, ...]
    consumer: str
    interleaved: bool = False


SEED = 0
TOLERANCE = 1e-4  # of float32 results of one elementwise function at other places of a tensor


def find_mlps(skeleton: nn.Module, structure: Structure, arguments: Sequence[Arguments]) -> tuple[Mlp, ...]:
    """Finds the MLPs of every block. Blocks of equal modules and shapes are tried once.

    Args:
        skeleton: the model on the meta device.
        structure: its blocks and targets. An MLP with a linear that is not a target is left out.
        arguments: what the model calls each block with; tensors on the meta device are replaced by random ones.
    """
    targets = {target.name for target in structure.targets}
    known: dict[str, list[Mlp]] = {}
    mlps: list[Mlp] = []
    for index, (name, given) in enumerate(zip(structure.blocks, arguments, strict=True)):
        block = skeleton.get_submodule(name)
        key = signature_of(block)
        if key not in known:
            experts = experts_computed(skeleton, "eager"), experts_tried(skeleton)
            with torch.enable_grad(), experts[0], experts[1]:  # also where gradients are switched off
                found = [one for first in _find_in(block, given) for one in _of_all_experts(block, first)]
            known[key] = [_as_mlp(block, one) for one in found]
        candidates = (_in_block(mlp, name, index) for mlp in known[key])
        mlps += [mlp for mlp in candidates if targets.issuperset(mlp.linears)]
    return tuple(mlps)


def signature_of(block: nn.Module) -> str:
    """Text that is equal for blocks of the same modules, settings that modules show, and shapes."""
    modules = [
        (name, type(module).__name__, module.extra_repr(), [tuple(own.shape) for own in module.parameters(False)])
        for name, module in distinct_modules(block)
    ]
    counts = [module.split_count for module in block.modules() if isinstance(module, SplitExperts)]
    return f"{modules} {counts}"


def _as_mlp(block: nn.Module, found: Found) -> Mlp:
    """An MLP by its names in the block."""
    producers, consumer, interleaved = found
    parents = [name.split(".")[:-1] for name in (*producers, consumer)]
    same = takewhile(lambda level: len(set(level)) == 1, zip(*parents, strict=False))
    shared = "".join(f"{level[0]}." for level in same)
    leaves = "+".join(name.removeprefix(shared) for name in (*producers, consumer))
    _, width = linear_shape(block.get_submodule(consumer))
    return Mlp(
        name=f"{shared}{leaves}",
        block=0,
        producers=producers,
        consumer=consumer,
        width=width,
        interleaved=interleaved,
        pool=_pool(block, shared, leaves),
    )


def _in_block(mlp: Mlp, name: str, index: int) -> Mlp:
    """An MLP by its names in the model."""
    return replace(
        mlp,
        name=f"{name}.{mlp.name}",
        block=index,
        producers=tuple(f"{name}.{producer}" for producer in mlp.producers),
        consumer=f"{name}.{mlp.consumer}",
        pool=None if mlp.pool is None else f"{name}.{mlp.pool}",
    )


def _pool(block: nn.Module, parent: str, leaves: str) -> str | None:
    """The pool of an MLP that is an expert: the layer's, by the names of the linears."""
    experts, _, index = parent.rstrip(".").rpartition(".")
    is_expert = index.isdecimal() and isinstance(block.get_submodule(experts), SplitExperts)
    return f"{experts}.{leaves}" if is_expert else None


def _of_all_experts(block: nn.Module, found: Found) -> list[Found]:
    """An MLP that is the first expert of a layer stands for all of them; any other for itself."""
    experts, _, index = found.consumer.rpartition(".")[0].rpartition(".")
    module = block.get_submodule(experts) if index == "0" else None
    if not isinstance(module, SplitExperts):
        return [found]
    names = [name.rpartition(".")[2] for name in (*found.producers, found.consumer)]
    of_each = [[f"{experts}.{number}.{name}" for name in names] for number in range(module.split_count)]
    return [Found(tuple(linears[:-1]), linears[-1], found.interleaved) for linears in of_each]


def _find_in(block: nn.Module, given: Arguments) -> list[Found]:
    """The MLPs of a block in the order of their consumers. No linear is in two of them."""
    trial = BlockTrial(block, given)
    taken: set[str] = set()
    found = []
    for producers, consumer in trial.candidates():
        orders = (False, True) if trial.is_fused(producers, consumer) else (False,)
        for interleaved in orders if taken.isdisjoint((*producers, consumer)) else ():
            if trial.can_narrow(producers, consumer, interleaved):
                found.append(Found(producers, consumer, interleaved))
                taken.update(producers, [consumer])
                break
    return found


class LinearStub(BlockStub):
    """Takes the place of a linear. Keeps its inputs; the outputs of its calls are random, and the same in every run."""

    def __init__(self, linear: nn.Module, generator: torch.Generator):
        super().__init__(linear, num_outputs=0)
        self.shape = linear_shape(linear)
        self.generator = generator
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.kept: Tensor | None = None  # the features to return; all by default

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        inputs = first_argument(args, kwargs)
        if len(self.inputs) == len(self.outputs):
            shape = (*inputs.shape[:-1], self.shape[0])
            self.outputs.append(torch.randn(shape, generator=self.generator).requires_grad_())
        outputs = self.outputs[len(self.inputs)]
        self.inputs.append(inputs)
        return outputs.clone() if self.kept is None else outputs[..., self.kept]


class BlockTrial:
    """Runs a block in float32 with stubs for its linears and random values for its other parameters."""

    def __init__(self, block: nn.Module, given: Arguments):
        self.block = block
        self.generator = torch.Generator().manual_seed(SEED)
        modules = dict(distinct_modules(block))
        self.stubs = {name: LinearStub(m, self.generator) for name, m in modules.items() if is_linear(m)}
        self.tensors = {name: self._real(buffer) for name, buffer in block.named_buffers()} | {
            name: self._random(parameter.shape)
            for name, parameter in block.named_parameters()
            if (owner := name.rpartition(".")[0]) in modules and owner not in self.stubs
        }
        args, kwargs = tree_map(lambda leaf: self._real(leaf) if isinstance(leaf, Tensor) else leaf, given)
        hidden = torch.randn((args[0] if args else kwargs["hidden_states"]).shape, generator=self.generator)
        self.given: Arguments = ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})
        self.results = self.run()
        self.inputs = {name: stub.inputs for name, stub in self.stubs.items()}

    def candidates(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Yields each linear with the linears that its input depends on, if it is called once and the widths fit."""
        called_once = {name: inputs[0] for name, inputs in self.inputs.items() if len(inputs) == 1}
        for consumer, inputs in called_once.items() if self.results is not None else ():
            producers, width = self.sources(inputs), inputs.shape[-1]
            widths_fit = width > 1 and all(self.stubs[name].shape[0] % width == 0 for name in producers)
            if producers and widths_fit:
                yield producers, consumer

    def sources(self, tensor: Tensor) -> tuple[str, ...]:
        """The linears from whose outputs a tensor was computed."""
        leaves = leaves_of(tensor)
        return tuple(
            name for name, stub in self.stubs.items() if any(leaf is made for leaf in leaves for made in stub.outputs)
        )

    def is_fused(self, producers: tuple[str, ...], consumer: str) -> bool:
        """Whether a producer makes several values of each inner feature."""
        return any(self.stubs[name].shape[0] > self.inputs[consumer][0].shape[-1] for name in producers)

    def can_narrow(self, producers: tuple[str, ...], consumer: str, interleaved: bool = False) -> bool:
        """Whether fewer and reordered features of the producers give the same features of the consumer's input."""
        width = self.inputs[consumer][0].shape[-1]
        order = torch.randperm(width, generator=self.generator)[: width - width // 3]
        kept = {}
        for name in producers:
            kept_CW = rows_by_feature(self.stubs[name].shape[0], width, interleaved)[order].mT
            kept[name] = (kept_CW.mT if interleaved else kept_CW).flatten()
        return self.selects(kept, consumer, order)

    def selects(self, rows: Mapping[str, Tensor], consumer: str, columns: Tensor) -> bool:
        """Whether producers that return these rows make these features of the consumer's input, and change no other."""
        for name, kept in rows.items():
            self.stubs[name].kept = kept
        results = self.run()
        for name in rows:
            self.stubs[name].kept = None
        expected = self.inputs | {consumer: [self.inputs[consumer][0][..., columns]]}
        return results is not None and _same(
            [results, *(stub.inputs for stub in self.stubs.values())], [self.results, *expected.values()]
        )

    def run(self) -> list[Tensor] | None:
        """The tensors that the block returns and that its arguments hold afterwards; None if it fails."""
        for stub in self.stubs.values():
            stub.inputs = []
        args, kwargs = tree_map(lambda leaf: leaf, self.given)  # containers of its own, which it may write into
        try:
            with replaced(self.block, dict(self.stubs)):
                output = functional_call(self.block, self.tensors, args, kwargs)
        except Exception:  # of any kind, by the class: it does not take outputs of these shapes or values
            return None
        return [leaf for leaf in tree_leaves((output, args, kwargs)) if isinstance(leaf, Tensor)]

    def _random(self, shape: torch.Size) -> Tensor:
        """Values from 0.5 to 1.5; large stacks of matrices hold one of them many times, which takes no memory."""
        own = shape[1:] if len(shape) > 2 and shape.numel() > LARGE else shape
        return (0.5 + torch.rand(own, generator=self.generator)).expand(shape)

    def _real(self, tensor: Tensor) -> Tensor:
        """A tensor with values: its own, in float32 where they are floating; random or zero for one that has none."""
        if not tensor.is_meta:
            return tensor.float() if tensor.is_floating_point() else tensor
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, generator=self.generator)
        return torch.zeros(tensor.shape, dtype=tensor.dtype)


def leaves_of(tensor: Tensor) -> list[Tensor]:
    """The tensors that a gradient of this one would reach, from autograd's graph: no gradient is computed."""
    waiting: list[Any] = [tensor.grad_fn]
    seen: set[Any] = {None}
    leaves: list[Tensor] = []
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            leaves += [node.variable] if hasattr(node, "variable") else []
            waiting += [following for following, _ in node.next_functions]
    return leaves


def rows_by_feature(rows: int, width: int, interleaved: bool) -> Tensor:
    """The rows of a producer that belong to each of ``width`` inner features (``width x copies``)."""
    numbers = torch.arange(rows)
    return numbers.view(width, -1) if interleaved else numbers.view(-1, width).mT


def _same(ours: Any, theirs: Any) -> bool:
    """Whether nested lists hold equal tensors."""
    pairs = list(zip(tree_leaves(ours), tree_leaves(theirs), strict=False))
    return len(tree_leaves(ours)) == len(tree_leaves(theirs)) and all(
        a.shape == b.shape
        and (torch.equal(a, b) or bool(torch.isclose(_wide(a), _wide(b), rtol=TOLERANCE, atol=TOLERANCE).all()))
        for a, b in pairs
    )


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_complex() else tensor.float()
