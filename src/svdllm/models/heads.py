"""Finds the heads of attentions by what a block does: channels that are computed apart from each other.

A column of the linear that reads them (``o_proj``) depends on some rows of its producers (``q_proj``, ``k_proj``,
``v_proj``), told by gradients; these rows change some columns, told by another run with other values. Columns and rows
that are connected are a group: a head of keys and values with all query heads that read it. Then the block is run with
some of the groups: the linear must read the same features of these groups. Where it does not, the integers of the
attention's module that count heads or channels are changed with the number of groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations, takewhile
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from svdllm.models.channels import SHARED, Channels
from svdllm.models.experts import experts_tried
from svdllm.models.hooks import experts_computed
from svdllm.models.mlps import BlockTrial, signature_of
from svdllm.models.structure import Structure
from svdllm.models.trial_pass import trial_pass

LARGEST_CHANGE = 1e-6  # of features that other values of a head do not reach
MOST_COUNTS = 3  # integers that are changed together


class HeadsFound(NamedTuple):
    """The heads of all blocks that have some, and why the groups of other linears cannot be removed, by linear."""

    heads: tuple[Channels, ...]
    refused: dict[str, str]


def find_heads(skeleton: PreTrainedModel, structure: Structure) -> HeadsFound:
    """Finds the heads of every block whose linears are all targets. Blocks of equal modules and shapes are tried once.

    Raises:
        UnsupportedModelError: as ``discover``.
    """
    arguments = trial_pass(skeleton, structure.blocks, {}).arguments
    targets = {target.name for target in structure.targets}
    in_mlps = {name for mlp in structure.mlps for name in mlp.linears}
    known: dict[str, tuple[list[Channels], dict[str, str]]] = {}
    heads: list[Channels] = []
    refused: dict[str, str] = {}
    for index, (block, given) in enumerate(zip(structure.blocks, arguments, strict=True)):
        module = skeleton.get_submodule(block)
        inside = {name.removeprefix(f"{block}.") for name in targets - in_mlps if name.startswith(f"{block}.")}
        key = f"{signature_of(module)} {sorted(inside)}"
        if key not in known:
            experts = experts_computed(skeleton, "eager"), experts_tried(skeleton)
            with torch.enable_grad(), experts[0], experts[1]:
                known[key] = _find_in(BlockTrial(module, given), inside)
        found, failed = known[key]
        heads += [_in_block(channels, block, index) for channels in found]
        refused |= {f"{block}.{name}": why for name, why in failed.items()}
    return HeadsFound(tuple(heads), refused)


def _in_block(found: Channels, block: str, index: int) -> Channels:
    """The channels of one block as those of an equal one, with full names."""
    return replace(
        found,
        name=f"{block}.{found.name}",
        block=index,
        producers={f"{block}.{name}": owners for name, owners in found.producers.items()},
        consumer=f"{block}.{found.consumer}",
        counts={f"{block}.{name}": share for name, share in found.counts.items()},
    )


def _find_in(trial: BlockTrial, inside: set[str]) -> tuple[list[Channels], dict[str, str]]:
    """The heads of a block, and the linears whose groups cannot be removed, with the reason; names in the block."""
    found: list[Channels] = []
    refused: dict[str, str] = {}
    if trial.results is None:
        return found, refused
    for consumer in sorted(inside):
        inputs = trial.inputs.get(consumer, [])  # of experts, the first alone is tried
        producers = trial.sources(inputs[0]) if len(inputs) == 1 else ()
        if not producers or not inside.issuperset(producers):
            continue
        groups = _Connections(trial, producers, consumer).groups()
        if groups is None:  # everything depends on everything, as behind a norm
            continue
        if (counts := _counts_of(trial, groups)) is None:
            refused[consumer] = "its heads depend on each other or on their number, or hold values beside linears"
        else:
            found.append(replace(groups, counts=counts))
    return found, refused


class _Connections:
    """Which rows of the producers and which columns of the consumer belong together."""

    def __init__(self, trial: BlockTrial, producers: tuple[str, ...], consumer: str):
        self.trial, self.producers, self.consumer = trial, producers, consumer
        self.inputs = trial.inputs[consumer][0]
        self.weights = torch.rand(self.inputs.shape[:-1], generator=trial.generator)[..., None] + 0.5

    def groups(self) -> Channels | None:
        """The groups; None if there is one only, groups overlap, or they are not of one size."""
        width = self.inputs.shape[-1]
        ends = [self.rows_of(torch.arange(width) == end) for end in (0, width - 1)]
        shared = {name: ends[0][name] & ends[1][name] for name in self.producers}
        columns = torch.full((width,), SHARED)
        owners = {name: torch.full((len(shared[name]),), SHARED) for name in self.producers}
        number = 0
        while bool((columns == SHARED).any()):
            start = torch.arange(width) == int((columns == SHARED).nonzero()[0])
            own_columns, own_rows = self.grown(start, shared)
            if bool((columns[own_columns] != SHARED).any()) or own_columns.all():
                return None
            columns[own_columns] = number
            for name, rows in own_rows.items():
                owners[name][rows] = number
            number += 1
        if any(len(set(owner[owner != SHARED].bincount().tolist())) > 1 for owner in (columns, *owners.values())):
            return None
        return Channels(
            name=self._name(),
            block=0,
            are_heads=True,
            producers=owners,
            consumer=self.consumer,
            columns=columns,
        )

    def _name(self) -> str:
        """The module that holds all linears."""
        parents = [name.split(".")[:-1] for name in (*self.producers, self.consumer)]
        same = takewhile(lambda level: len(set(level)) == 1, zip(*parents, strict=False))
        return ".".join(level[0] for level in same) or self.consumer

    def grown(self, columns: Tensor, shared: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """All columns and rows that are connected with some columns."""
        while True:
            rows = {name: own & ~shared[name] for name, own in self.rows_of(columns).items()}
            more = columns | self.columns_of(rows)
            if torch.equal(more, columns):
                return columns, rows
            columns = more

    def rows_of(self, columns: Tensor) -> dict[str, Tensor]:
        """The rows (masks by producer) that some columns depend on."""
        outputs = [self.trial.stubs[name].outputs[0] for name in self.producers]
        total = (self.inputs * self.weights)[..., columns].sum()
        gradients = torch.autograd.grad(total, outputs, retain_graph=True, allow_unused=True)
        return {
            name: torch.zeros(output.shape[-1], dtype=torch.bool)
            if gradient is None
            else gradient.flatten(end_dim=-2).ne(0).any(0)
            for name, output, gradient in zip(self.producers, outputs, gradients, strict=True)
        }

    def columns_of(self, rows: Mapping[str, Tensor]) -> Tensor:
        """The columns (a mask) that change with some rows."""
        stubs = {name: self.trial.stubs[name] for name in self.producers}
        before = {name: stub.outputs[0] for name, stub in stubs.items()}
        for name, stub in stubs.items():
            other = torch.randn(before[name].shape, generator=self.trial.generator)
            stub.outputs[0] = torch.where(rows[name], other, before[name].detach())
        self.trial.run()
        made = self.trial.stubs[self.consumer].inputs
        for name, stub in stubs.items():
            stub.outputs[0] = before[name]
        changes = (made[0].detach() - self.inputs.detach()).abs() if made else torch.ones_like(self.inputs)
        return changes.flatten(end_dim=-2).amax(0) > LARGEST_CHANGE


def _counts_of(trial: BlockTrial, groups: Channels) -> dict[str, int] | None:
    """The integers that must change with the number of groups, with the share of each; None if that is not enough."""
    kept = torch.arange(groups.num_groups) % 3 != 1
    rows = {name: groups.kept(name, kept) for name in groups.producers}
    columns = groups.kept(groups.consumer, kept)
    holder = groups.consumer.rpartition(".")[0]
    shares = _candidates(trial.block.get_submodule(holder), groups.num_groups, len(groups.columns))
    for number in range(MOST_COUNTS + 1):
        for names in combinations(shares, number):
            changed = {name: shares[name] * int(kept.sum()) for name in names}
            with counts_changed(trial.block.get_submodule(holder), changed):
                if trial.selects(rows, groups.consumer, columns):
                    return {f"{holder}.{name}" if holder else name: shares[name] for name in names}
    return None


def _candidates(module: nn.Module, num_groups: int, width: int) -> dict[str, int]:
    """Integers of a module that may count groups, heads or channels, with the share of one group."""
    integers = {name: value for name, value in vars(module).items() if type(value) is int and value > 1}
    return {
        name: value // num_groups
        for name, value in integers.items()
        if value % num_groups == 0 and width % value == 0 and not name.startswith("_")
    }


@contextmanager
def counts_changed(module: nn.Module, counts: Mapping[str, int]) -> Iterator[None]:
    """Gives integers of a module other values while the context lasts."""
    before = {name: getattr(module, name) for name in counts}
    vars(module).update(counts)
    try:
        yield
    finally:
        vars(module).update(before)
