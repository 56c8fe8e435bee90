"""Discovers blocks, targets and groups of any causal language model: no table of names, no model code.

Everything here works on a *skeleton*: the model on the meta device, whose parameters have shapes and no values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from svdllm.common.errors import InputError, UnsupportedModelError
from svdllm.models.hooks import input_groups, replaced, to_device
from svdllm.models.linears import find_blocks, is_linear, linear_shape, linears_of, listing, matches
from svdllm.models.loaded_weights import tensors_replaced
from svdllm.models.mlps import Arguments, find_mlps
from svdllm.models.shared_state import WrittenArguments
from svdllm.models.structure import Structure, Target, with_mlps
from svdllm.models.stubs import BlockStub

OBSERVED_TOKENS = 8


def discover(skeleton: PreTrainedModel, ignore: Sequence[str] = ()) -> Structure:
    """Finds the blocks and the targets of a skeleton, with one forward pass on the meta device.

    Raises:
        UnsupportedModelError: there is no stack of blocks; a block holds weights outside linears (such as stacked
            expert tensors of a mixture of experts); or a block changes an argument in a way that cannot be carried
            from block to block. Lists the modules.
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
            f"nothing to calibrate them on: {listing(unused)}. Leave them dense with --ignore."
        )
    structure = Structure(
        blocks=tuple(blocks),
        targets=tuple(_as_target(name, index, module, groups[name]) for name, index, module in kept),
        ignored=tuple(ignored),
        returns_tuple=tuple(probe.returns_tuple for probe in probes),
        shared_arguments=arguments.names,
        shared_features=arguments.num_features,
    )
    return with_mlps(structure, find_mlps(skeleton, structure, [probe.given for probe in probes]))


class _MetaProbe(BlockStub):
    """Runs its block on the meta device and returns the hidden states unchanged. Keeps the arguments of the call."""

    given: Arguments

    def __init__(self, name: str, block: nn.Module, arguments: WrittenArguments):
        super().__init__(block, returns_tuple=False)
        self.name, self.arguments = name, arguments

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.given = args, kwargs
        block: nn.Module = self.block
        buffers = {name: buffer.to("meta") for name, buffer in block.named_buffers()}

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(block, buffers, args, kwargs)

        output = self.arguments.watch(self.name, call, args, kwargs, lambda value: to_device(value, "meta"))
        self.returns_tuple = isinstance(output, tuple)
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if self.returns_tuple else hidden


def _observe(
    skeleton: PreTrainedModel, blocks: list[str], linears: list[tuple[str, nn.Module]]
) -> tuple[dict[str, str], list[_MetaProbe], WrittenArguments]:
    """Makes a forward pass over eight tokens. Only what is around the blocks computes, with weights of zeros."""
    arguments = WrittenArguments(type(skeleton).__name__, OBSERVED_TOKENS)
    probes = {name: _MetaProbe(name, skeleton.get_submodule(name), arguments) for name in blocks}
    zeros = tensors_replaced(skeleton, _zeros_outside(skeleton, blocks))
    with zeros, replaced(skeleton, dict(probes)), input_groups(linears) as (groups, _):
        token_ids = torch.zeros(1, OBSERVED_TOKENS, dtype=torch.long)
        with torch.no_grad():
            skeleton.base_model(input_ids=token_ids, use_cache=False)
    return groups, list(probes.values()), arguments


def _zeros_outside(skeleton: nn.Module, blocks: list[str]) -> dict[str, Tensor]:
    """Makes zeros for the parameters outside the blocks: on the CPU, with stride 0, so that they take no memory."""
    inside = tuple(f"{name}." for name in blocks)
    return {
        name: torch.zeros(1, dtype=parameter.dtype).expand(parameter.shape)
        for name, parameter in skeleton.named_parameters(remove_duplicate=False)
        if not name.startswith(inside)
    }


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
    """Raises UnsupportedModelError for a matrix in a block that is not in a linear, or in two of them."""
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
            f"{listing(foreign)}. Mixtures of experts with stacked expert tensors, convolutions and weights shared "
            "between blocks are not supported yet."
        )
    if not any(True for block in blocks for _ in linears_of(skeleton.get_submodule(block))):
        raise UnsupportedModelError(f"The blocks of {type(skeleton).__name__} hold no linear layer.")


def _ignored(names: list[str], ignore: Sequence[str]) -> list[str]:
    for pattern in ignore:
        if not any(matches(pattern, name) for name in names):
            raise InputError(
                f"--ignore {pattern!r} matches none of the {len(names)} linears; they are named like {listing(names)}."
            )
    ignored = [name for name in names if any(matches(pattern, name) for pattern in ignore)]
    if len(ignored) == len(names):
        raise InputError(f"--ignore {' '.join(ignore)!r} matches every linear: nothing is left to compress.")
    return ignored
