"""Blocks, targets and groups of any causal language model, found by looking at it: no table of names, no model code.

Everything here works on a *skeleton*: the model on the meta device, whose parameters have shapes and no values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from svdllm.common.errors import InputError, UnsupportedModelError
from svdllm.models.shared_state import Argument, WrittenArguments

OBSERVED_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Target:
    """One linear that may be compressed, or several that read the same tensor and are to share their first factor.

    ``group`` is the name of the first target that reads the same tensor.
    """

    name: str
    block: int
    in_features: int
    out_features: int
    has_bias: bool
    is_conv1d: bool  # GPT-2's Conv1D keeps its weight as (in, out)
    group: str
    bias_corrected: bool = False  # factorised, it has a bias that makes its mean output the dense one
    parts: tuple[tuple[str, int], ...] = ()  # of several linears: name and out_features of each, the rows from the top

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the modules."""
        return tuple(name for name, _ in self.parts) or (self.name,)

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """The rows (``out_features`` of them) that belong to each linear."""
        return dict(zip(self.linears, rows.split([size for _, size in self.parts] or len(rows)), strict=True))

    def stacked(self, weights: Sequence[Tensor]) -> Tensor:
        """Weights of the linears as they are kept, one under the other: ``out x in``."""
        rows = [weight.mT if self.is_conv1d else weight for weight in weights]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def matched_by(self, pattern: str) -> bool:
        """Whether the name of a linear of it matches."""
        return any(matches(pattern, name) for name in self.linears)

    @property
    def num_weights(self) -> int:
        return self.in_features * self.out_features

    @property
    def full_rank(self) -> int:
        return min(self.in_features, self.out_features)

    @property
    def break_even_rank(self) -> int:
        """The largest rank whose factors are smaller than the dense matrix."""
        return (self.num_weights - self.added_params - 1) // (self.in_features + self.out_features)

    @property
    def added_params(self) -> int:
        """Of the bias that a correction adds where the dense linear has none."""
        return self.out_features * (self.bias_corrected and not self.has_bias)

    def factor_params(self, rank: int) -> int:
        return rank * (self.in_features + self.out_features) + self.added_params

    def params(self, rank: int | None) -> int:
        """Of the factors of a rank, with the bias that a correction adds, or of the dense matrix (None)."""
        return self.num_weights if rank is None else self.factor_params(rank)


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What a model is made of, as far as compression needs to know."""

    blocks: tuple[str, ...]  # module names, in the order of the model
    targets: tuple[Target, ...]  # not ignored, in the order of the model
    ignored: tuple[str, ...]  # linears inside the blocks that --ignore leaves alone
    returns_tuple: tuple[bool, ...]  # per block: whether the hidden states come first in a tuple
    shared_arguments: tuple[Argument, ...] = ()  # mappings that blocks write into for later ones
    shared_features: int = 0  # values that these hold for a token

    def block_targets(self, block: int) -> list[Target]:
        return [target for target in self.targets if target.block == block]

    @property
    def num_target_params(self) -> int:
        """Weights of the targets, biases apart: what ``ratio`` is a share of."""
        return sum(target.num_weights for target in self.targets)


def discover(skeleton: PreTrainedModel, ignore: Sequence[str] = ()) -> Structure:
    """Looks at a skeleton once.

    Raises:
        UnsupportedModelError: there is no stack of blocks, or a block holds weights that are no linear's (a mixture
            of experts with stacked expert tensors, say), or one changes an argument in a way that cannot be carried
            from block to block; lists the modules.
        InputError: a pattern of ``ignore`` matches nothing, or everything.
    """
    blocks = find_blocks(skeleton)
    _refuse_foreign_weights(skeleton, blocks)
    linears = [
        (name, index, module)
        for index, block in enumerate(blocks)
        for name, module in linears_of(skeleton.get_submodule(block), prefix=block)
    ]
    ignored = _ignored([name for name, _, _ in linears], ignore)
    kept = [linear for linear in linears if linear[0] not in ignored]
    groups, probes, arguments = _observe(skeleton, blocks, [(name, module) for name, _, module in kept])
    unused = [name for name, _, _ in kept if name not in groups]
    if unused:
        raise UnsupportedModelError(
            f"{len(unused)} linears are never called by the forward pass of {type(skeleton).__name__}, so there is "
            f"nothing to calibrate them on: {_listing(unused)}. Leave them dense with --ignore."
        )
    return Structure(
        blocks=tuple(blocks),
        targets=tuple(_as_target(name, index, module, groups[name]) for name, index, module in kept),
        ignored=tuple(ignored),
        returns_tuple=tuple(probe.returns_tuple for probe in probes),
        shared_arguments=arguments.names,
        shared_features=arguments.num_features,
    )


def with_joint_keys_and_values(structure: Structure) -> Structure:
    """The structure, if ``k_proj`` and ``v_proj`` of every layer are one target, as in multi-head latent attention.

    A linear that is ignored, or that has a bias where the other has none, is left by itself.

    Raises:
        UnsupportedModelError: there is no such pair.
    """
    by_name = {target.name: target for target in structure.targets}
    joint: dict[str, Target] = {}
    for keys in structure.targets:
        parent, _, leaf = keys.name.rpartition(".")
        values = by_name.get(f"{parent}.v_proj")
        if leaf == "k_proj" and values and (values.group, values.has_bias) == (keys.group, keys.has_bias):
            joint[keys.name] = joint[values.name] = _joint(keys, values)
    if not joint:
        raise UnsupportedModelError(
            "No layer has a k_proj and a v_proj that read the same tensor and may both be compressed, so there is nothing "
            f"to give one first factor to; the linears are {_listing([target.name for target in structure.targets])}. "
            "Leave out --joint-kv."
        )
    targets = dict.fromkeys(joint.get(target.name, target) for target in structure.targets)
    renamed = {name: target.name for name, target in joint.items()}
    groups = (replace(target, group=renamed.get(target.group, target.group)) for target in targets)
    return replace(structure, targets=tuple(groups))


def _joint(keys: Target, values: Target) -> Target:
    return replace(
        keys,
        name=f"{keys.name}+{values.name.rpartition('.')[2]}",
        out_features=keys.out_features + values.out_features,
        parts=((keys.name, keys.out_features), (values.name, values.out_features)),
    )


def linear_ranks(targets: Sequence[Target], ranks: Mapping[str, int]) -> dict[str, int]:
    """Ranks by linear, of ranks by target."""
    return {name: ranks[target.name] for target in targets if target.name in ranks for name in target.linears}


def shared_factors(targets: Sequence[Target], ranks: Mapping[str, int]) -> dict[str, str]:
    """Factorised linears that have their first factor from another: linear -> that other."""
    factorised = (target.linears for target in targets if target.name in ranks)
    return {name: first for first, *others in factorised for name in others}


def weight_of(model: nn.Module, target: Target) -> Tensor:
    """The weight as ``out x in``, whatever the modules keep; of several linears one under the other."""
    weights: list[Any] = [model.get_submodule(name).weight for name in target.linears]
    return target.stacked([weight.detach() for weight in weights])


def bias_of(model: nn.Module, target: Target) -> Tensor | None:
    """The bias of a target, or None."""
    biases: list[Any] = [model.get_submodule(name).bias for name in target.linears]
    return torch.cat([bias.detach() for bias in biases]) if target.has_bias else None


def bias_corrected(structure: Structure) -> Structure:
    """The structure, if the bias of every factorised target is corrected."""
    targets = tuple(replace(target, bias_corrected=True) for target in structure.targets)
    return replace(structure, targets=targets)


def is_linear(module: nn.Module) -> bool:
    """``nn.Linear``, a subclass that keeps its ``weight`` (out x in), or GPT-2's ``Conv1D``."""
    return isinstance(module, nn.Linear | Conv1D) and module.weight.ndim == 2


def linears_of(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every linear below ``module`` with its full name."""
    for name, child in module.named_modules(prefix=prefix):
        if is_linear(child):
            yield name, child


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """``(out_features, in_features)`` of a linear."""
    rows, columns = module.weight.shape  # type: ignore[union-attr, misc]
    return (int(columns), int(rows)) if isinstance(module, Conv1D) else (int(rows), int(columns))


def find_blocks(skeleton: nn.Module) -> list[str]:
    """Names of the repeated decoder layers: the items of the one outermost ``ModuleList`` that holds the linears."""
    stacks: dict[str, int] = {}
    for name, module in skeleton.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in stacks)
        if isinstance(module, nn.ModuleList) and not nested:
            size = sum(p.numel() for p in module.parameters())
            if size:
                stacks[name] = size
    if not stacks:
        raise UnsupportedModelError(
            f"{type(skeleton).__name__} has no stack of decoder blocks (a ModuleList with weights). Its modules are: "
            f"{_listing([name for name, _ in skeleton.named_children()])}."
        )
    if len(stacks) > 1:
        raise UnsupportedModelError(
            f"{type(skeleton).__name__} has {len(stacks)} stacks of blocks, one was expected: {_listing(list(stacks))}."
        )
    (stack,) = stacks
    return [f"{stack}.{index}" for index in range(len(skeleton.get_submodule(stack)))]  # type: ignore[arg-type]


@contextmanager
def input_groups(linears: Sequence[tuple[str, nn.Module]], on_input: Callable[[str, Tensor], None] | None = None):
    """Finds which linears read the same tensor, by its identity, while a block runs.

    Yields ``groups``, a dict linear -> first linear that read the same tensor. ``on_input(leader, inputs)`` is called
    once per distinct input of every call. Tensors are held until ``release`` (an entry of the hooks' owner), so that
    identities cannot be reused within one run of the block.
    """
    groups: dict[str, str] = {}
    seen: dict[int, tuple[Tensor, str]] = {}

    def hook_for(name: str):
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            _, leader = seen.setdefault(id(inputs), (inputs, name))
            if groups.setdefault(name, leader) != leader:
                raise UnsupportedModelError(
                    f"{name} shared its input with {groups[name]} before and with {leader} now; its inputs cannot be "
                    "grouped. Leave it dense with --ignore."
                )
            if on_input is not None and leader == name:
                on_input(leader, inputs)

        return hook

    handles = [module.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, module in linears]
    try:
        yield groups, seen.clear
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(model: nn.Module, replacements: Mapping[str, nn.Module]):
    """Other modules stand in the place of the named ones while the context lasts."""
    originals = {name: model.get_submodule(name) for name in replacements}
    try:
        for name, module in replacements.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)


def to_device(tree: Any, device: torch.device | str) -> Any:
    """Moves every tensor in nested lists, tuples and dicts."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)


class _MetaProbe(nn.Module):
    """Runs the real block on the meta device beside the pass and hands the hidden states on unchanged."""

    def __init__(self, name: str, block: nn.Module, arguments: WrittenArguments):
        super().__init__()
        self.name, self.block, self.arguments = name, block, arguments
        self.returns_tuple = False

    def __getattr__(self, name: str) -> Any:
        # Some models read attributes of their blocks (Gemma's attention_type) before calling them.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        buffers = {name: buffer.to("meta") for name, buffer in self.block.named_buffers()}

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.block, buffers, args, kwargs)

        output = self.arguments.watch(self.name, call, args, kwargs, lambda value: to_device(value, "meta"))
        self.returns_tuple = isinstance(output, tuple)
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if self.returns_tuple else hidden


def _observe(
    skeleton: PreTrainedModel, blocks: list[str], linears: list[tuple[str, nn.Module]]
) -> tuple[dict[str, str], list[_MetaProbe], WrittenArguments]:
    """One pass over eight tokens in which only the machinery around the blocks is real, and all of it zeros."""
    arguments = WrittenArguments(type(skeleton).__name__, OBSERVED_TOKENS)
    probes = {name: _MetaProbe(name, skeleton.get_submodule(name), arguments) for name in blocks}
    with replaced(skeleton, dict(probes)), _zeros_outside(skeleton, blocks), input_groups(linears) as (groups, _):
        token_ids = torch.zeros(1, OBSERVED_TOKENS, dtype=torch.long)
        with torch.no_grad():
            skeleton.base_model(input_ids=token_ids, use_cache=False)
    return groups, list(probes.values()), arguments


@contextmanager
def _zeros_outside(skeleton: nn.Module, blocks: list[str]):
    """Parameters outside the blocks become zeros of no size (stride 0) on the CPU while the context lasts."""
    inside = tuple(f"{name}." for name in blocks)
    outside = [name for name, _ in skeleton.named_parameters() if not name.startswith(inside)]
    held = {}
    for name in outside:
        owner, _, leaf = name.rpartition(".")
        module = skeleton.get_submodule(owner)
        held[name] = getattr(module, leaf)
        zeros = torch.zeros(1, dtype=held[name].dtype).expand(held[name].shape)
        setattr(module, leaf, nn.Parameter(zeros, requires_grad=False))
    try:
        yield
    finally:
        for name, parameter in held.items():
            owner, _, leaf = name.rpartition(".")
            setattr(skeleton.get_submodule(owner), leaf, parameter)


def _as_target(name: str, block: int, module: nn.Module, group: str) -> Target:
    out_features, in_features = linear_shape(module)
    return Target(
        name=name,
        block=block,
        in_features=in_features,
        out_features=out_features,
        has_bias=module.bias is not None,
        is_conv1d=isinstance(module, Conv1D),
        group=group,
    )


def _refuse_foreign_weights(skeleton: nn.Module, blocks: list[str]) -> None:
    """Every weight of two or more dimensions inside a block must belong to a linear of its own."""
    foreign, owners = [], {}
    for block in blocks:
        for name, module in skeleton.get_submodule(block).named_modules(prefix=block):
            for leaf, parameter in module.named_parameters(recurse=False):
                full = f"{name}.{leaf}"
                if parameter.ndim >= 2 and not is_linear(module):
                    foreign.append(f"{name} ({type(module).__name__}.{leaf} {tuple(parameter.shape)})")
                elif id(parameter) in owners:
                    foreign.append(f"{full} (shared with {owners[id(parameter)]})")
                owners[id(parameter)] = full
    if foreign:
        raise UnsupportedModelError(
            f"{type(skeleton).__name__} keeps weights that are not plain linear layers, {len(foreign)} in all: "
            f"{_listing(foreign)}. Mixtures of experts with stacked expert tensors, convolutions and weights shared "
            "between blocks are not supported yet."
        )
    if not any(True for block in blocks for _ in linears_of(skeleton.get_submodule(block))):
        raise UnsupportedModelError(f"The blocks of {type(skeleton).__name__} hold no linear layer.")


def _ignored(names: list[str], ignore: Sequence[str]) -> list[str]:
    for pattern in ignore:
        if not any(matches(pattern, name) for name in names):
            raise InputError(
                f"--ignore {pattern!r} matches none of the {len(names)} linears; they are named like {_listing(names)}."
            )
    ignored = [name for name in names if any(matches(pattern, name) for pattern in ignore)]
    if len(ignored) == len(names):
        raise InputError(f"--ignore {' '.join(ignore)!r} matches every linear: nothing is left to compress.")
    return ignored


def matches(pattern: str, name: str) -> bool:
    """Patterns are regular expressions, searched anywhere in the module's name."""
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise InputError(f"{pattern!r} is not a regular expression: {error}.") from error


def _listing(names: Sequence[str], limit: int = 8) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
