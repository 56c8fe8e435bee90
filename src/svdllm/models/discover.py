"""Discovers blocks, targets and groups of any causal language model: no table of names, no model code.

Everything here works on a *skeleton*: the model on the meta device, whose parameters have shapes and no values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from svdllm.common.errors import InputError, UnsupportedModelError
from svdllm.models.experts import expert_tensors, first_experts, pool_of
from svdllm.models.left_dense import IGNORED, READ, SHARED, UNCALLED, dense_modules, parameter_owners, shared_modules
from svdllm.models.linears import find_blocks, linear_shape, linears_of, listing, matches
from svdllm.models.mlps import find_mlps
from svdllm.models.structure import Structure, Target, with_mlps
from svdllm.models.trial_pass import Trial, trial_pass
from svdllm.models.wrapped import outside_parts


def discover(skeleton: PreTrainedModel, ignore: Sequence[str] = ()) -> Structure:
    """Finds the blocks and the targets of a skeleton, with one forward pass without data.

    A target is a linear that the blocks call, and use in no other way. Whatever else the blocks hold stays as it is.

    Raises:
        UnsupportedModelError: there is no stack of blocks; no block calls a linear; or a block changes an argument in a
            way that cannot be carried from block to block. Lists the modules.
        InputError: a pattern of ``ignore`` matches nothing, or everything.
    """
    blocks = find_blocks(skeleton)
    linears = {name: module for block in blocks for name, module in _linears_in(skeleton, block)}
    if not linears:
        raise UnsupportedModelError(f"The blocks of {type(skeleton).__name__} hold no linear layer.")
    reasons = dict.fromkeys(_ignored(list(linears), ignore), IGNORED)
    reasons |= dict.fromkeys(shared_modules(skeleton) & linears.keys() - reasons.keys(), SHARED)
    candidates = {name: module for name, module in linears.items() if name not in reasons}
    first = first_experts(skeleton)
    tried = {name for name in linears if first.get(name) == name} | (candidates.keys() - first.keys())
    trial = trial_pass(skeleton, blocks, {name: module for name, module in linears.items() if name in tried})
    groups = _groups(trial, candidates, first)
    reasons |= {name: UNCALLED for name in candidates if name not in groups}
    reasons |= {name: READ for name in candidates if first.get(name, name) in trial.read and name not in reasons}
    targets = _targets(skeleton, trial, {name: groups[name] for name in candidates if name not in reasons})
    if not targets:
        raise UnsupportedModelError(f"The blocks of {type(skeleton).__name__} call no linear that can be compressed.")
    structure = _structure(trial, targets)
    names = {target.name for target in targets}
    owners = list(parameter_owners(skeleton, trial.blocks))
    structure = replace(
        structure,
        dense=dense_modules(owners, names, reasons),
        num_block_params=sum(params for _, _, params in owners),
        outside=outside_parts(skeleton),
    )
    return with_mlps(structure, find_mlps(skeleton, structure, trial.arguments))


def discover_blocks(skeleton: PreTrainedModel) -> Structure:
    """Finds the blocks of a skeleton only, which is what a walk needs; there are no targets.

    Raises:
        UnsupportedModelError: as ``discover``.
    """
    return _structure(trial_pass(skeleton, find_blocks(skeleton), {}), ())


def _structure(trial: Trial, targets: tuple[Target, ...]) -> Structure:
    return Structure(
        blocks=trial.blocks,
        targets=targets,
        num_outputs=trial.num_outputs,
        batch_dim=trial.batch_dim,
        shared_arguments=trial.written.names,
        shared_features=trial.written.num_features,
        handed=tuple(trial.written.handed),
        idle=trial.idle,
    )


def _linears_in(skeleton: nn.Module, block: str) -> list[tuple[str, nn.Module]]:
    return list(linears_of(skeleton.get_submodule(block), prefix=block))


def _groups(trial: Trial, names: Collection[str], first: Mapping[str, str]) -> dict[str, str]:
    """Called linear -> the first linear that reads the same tensors; of an expert, as of the first of its layer."""
    groups = {}
    for name in names:
        tried = first.get(name, name)
        if tried in trial.groups:
            leader = trial.groups[tried]
            own = f"{name.rpartition('.')[0]}.{leader.rpartition('.')[2]}"
            groups[name] = own if name != tried and leader in first else leader
    return groups


def _targets(skeleton: nn.Module, trial: Trial, groups: Mapping[str, str]) -> tuple[Target, ...]:
    """Makes targets of linears; a group is named after its first linear that is a target."""
    leaders: dict[str, str] = {}
    for name, group in groups.items():
        leaders.setdefault(group, name)
    places = expert_tensors(skeleton)
    found = [
        _as_target(name, block, module, leaders[groups[name]], pool_of(name, places))
        for block, stem in enumerate(trial.blocks)
        for name, module in skeleton.get_submodule(stem).named_modules(prefix=stem)
        if name in groups
    ]
    return tuple(found)


def _as_target(name: str, block: int, module: nn.Module, group: str, pool: str | None) -> Target:
    out_features, in_features = linear_shape(module)
    return Target(
        name=name,
        block=block,
        in_features=in_features,
        out_features=out_features,
        has_bias=module.bias is not None,
        is_conv1d=isinstance(module, Conv1D),
        group=group,
        pool=pool,
    )


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
