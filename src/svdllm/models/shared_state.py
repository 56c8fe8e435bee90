"""Carries what blocks make for later blocks beside the hidden states: keys and values, or chosen tokens.

Some models pass one mapping to all of their blocks (``shared_kv_states`` in Gemma 3n and Gemma 4). Some blocks write
tensors into it, later blocks read them. Others hand a second output of a block to a later one (the tokens that an
indexer chose, in GLM-5). Like the hidden states, these are outputs of each block: every stream (dense, compressed, one
probe) needs its own for every batch, and gradients flow back through them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, MutableMapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from svdllm.common.errors import UnsupportedModelError

Argument = str | int  # of a block's call: its keyword, or its position behind the hidden states
Key = tuple[Argument, Hashable]  # argument and the key in its mapping
State = Mapping[Key, Any]  # nested tuples of tensors
NOTHING: State = {}
RETURNED = "<returned>"  # stands for an argument in the keys of outputs that are handed on


@dataclass(frozen=True)
class Handed:
    """An output of a block at a position behind the hidden states, and the argument of a later block that takes it."""

    writer: str
    position: int
    reader: str
    argument: Argument

    @property
    def key(self) -> Key:
        return RETURNED, (self.writer, self.position)


@dataclass(frozen=True)
class Ports:
    """How a block is connected to others beside its hidden states.

    shared: its arguments that are mappings, which blocks write into.
    takes: argument -> key of the output of an earlier block that it takes.
    hands: position of an output that a later block takes -> its key.
    """

    shared: tuple[Argument, ...] = ()
    takes: Mapping[Argument, Key] = field(default_factory=dict)
    hands: Mapping[int, Key] = field(default_factory=dict)

    @classmethod
    def of(cls, block: str, shared: Iterable[Argument], handed: Iterable[Handed]) -> Ports:
        handed = list(handed)
        return cls(
            shared=tuple(shared),
            takes={link.argument: link.key for link in handed if link.reader == block},
            hands={link.position: link.key for link in handed if link.writer == block},
        )


def contents(argument: Argument, mapping: Mapping[Any, Any]) -> dict[Key, Any]:
    """The entries of a mapping that is an argument of blocks."""
    return {(argument, key): entry for key, entry in mapping.items()}


def refilled(argument: Argument, mapping: MutableMapping[Any, Any], state: State) -> MutableMapping[Any, Any]:
    """Copies a mapping and adds the entries of ``state``, so that a block may write into it."""
    fresh = copy(mapping)
    fresh.update({key: entry for (owner, key), entry in state.items() if owner == argument})
    return fresh


def written(before: State, after: State) -> dict[Key, Any]:
    """The entries of ``after`` that are new or replaced since ``before``, told by the identity of their tensors."""
    held = {key: [id(leaf) for leaf in tree_leaves(entry)] for key, entry in before.items()}
    return {key: entry for key, entry in after.items() if [id(leaf) for leaf in tree_leaves(entry)] != held.get(key)}


def moved(state: State, move: Callable[[Tensor], Tensor]) -> dict[Key, Any]:
    """Applies ``move`` to every tensor of a state."""
    return {key: tree_map(lambda leaf: move(leaf) if isinstance(leaf, Tensor) else leaf, e) for key, e in state.items()}


def tensors_of(entry: Any) -> list[Tensor]:
    """The tensors of an entry, in a fixed order."""
    return [leaf for leaf in tree_leaves(entry) if isinstance(leaf, Tensor)]


class SharedStates:
    """The entries that the blocks of one stream have written, by batch, each with the block that wrote it."""

    def __init__(self) -> None:
        self._entries: dict[int, dict[Key, list[tuple[int, Any]]]] = {}

    def write(self, batch: int, block: int, entries: State) -> None:
        """Adds what a block wrote in a batch; earlier entries of the same keys stay for the reverse walk."""
        of_batch = self._entries.setdefault(batch, {})
        for key, entry in entries.items():
            of_batch.setdefault(key, []).append((block, entry))

    def before(self, batch: int, block: int) -> State:
        """The state that a block finds: for every key, the last entry that an earlier block wrote."""
        found = {
            key: [entry for writer, entry in entries if writer < block]
            for key, entries in self._entries.get(batch, {}).items()
        }
        return {key: entries[-1] for key, entries in found.items() if entries}


class StateGradients:
    """Gradients of the loss in the entries of the shared state, by batch, during a reverse walk."""

    def __init__(self) -> None:
        self._gradients: dict[int, dict[Key, list[Tensor | None]]] = {}

    def of_written(self, batch: int, entries: State) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the tensors that a block wrote and later blocks read, each with its gradient by those later blocks."""
        gradients = self._gradients.get(batch, {})
        for key, entry in entries.items():
            for tensor, gradient in zip(tensors_of(entry), gradients.get(key, ()), strict=False):
                if tensor.requires_grad and gradient is not None:
                    yield tensor, gradient.to(tensor.device)

    def step_back(self, batch: int, found: State, entries: State) -> None:
        """Replaces the gradients behind a block by the gradients before it.

        Args:
            found: the state that the block was run with; the ``grad`` of its tensors is this block's share.
            entries: the entries that the block wrote.
        """
        behind = self._gradients.get(batch, {})
        before: dict[Key, list[Tensor | None]] = {}
        for key in {**found, **behind}:
            later = [] if key in entries else behind.get(key, [])
            own = [tensor.grad for tensor in tensors_of(found[key])] if key in found else []
            before[key] = _summed(later, own)
        self._gradients[batch] = before


def differentiable(state: State, device: torch.device) -> dict[Key, Any]:
    """Copies a state into leaf tensors, in which a backward pass accumulates gradients."""

    def leaf(tensor: Tensor) -> Tensor:
        fresh = tensor.detach().to(device, copy=True)
        return fresh.requires_grad_() if fresh.is_floating_point() else fresh

    return moved(state, leaf)


def _summed(first: list[Tensor | None], second: list[Tensor | None]) -> list[Tensor | None]:
    if not first or not second:
        return [gradient if gradient is None else gradient.cpu() for gradient in first or second]
    pairs = zip(first, second, strict=True)
    return [b if a is None else a if b is None else (a.cpu() + b.cpu()) for a, b in pairs]


class WrittenArguments:
    """Finds the arguments that blocks write into or take from others, while they run one after the other.

    Mappings of tensors, and tensors that a block returns beside the hidden states, can be carried as a shared state.
    Anything else that a block changes or hands on (a list, a tensor changed in place) cannot, and is refused. So is a
    block that runs twice, because its calls would have to be told apart, and a model that changes the hidden states
    between two blocks.
    """

    def __init__(self, model: str, num_tokens: int):
        self._model, self._num_tokens = model, num_tokens
        self._mappings: dict[Argument, MutableMapping[Any, Any]] = {}
        self._sizes: dict[Key, int] = {}
        self._returned: list[tuple[Tensor, str, int]] = []  # tensor, block, position beside the hidden states
        self._last: tuple[str, Tensor] | None = None
        self.handed: list[Handed] = []
        self._called: set[str] = set()

    @property
    def names(self) -> tuple[Argument, ...]:
        return tuple(dict.fromkeys(argument for argument, _ in self._sizes))

    @property
    def num_features(self) -> int:
        """Number of values per token in the shared state after the last block."""
        taken = {link.key for link in self.handed}
        handed = sum(t.numel() for t, block, position in self._returned if (RETURNED, (block, position)) in taken)
        return (sum(self._sizes.values()) + handed) // self._num_tokens

    def enter(self, block: str, hidden: Tensor) -> None:
        """Is told the hidden states that a block is called with.

        Raises:
            UnsupportedModelError: they are not those that the block before has returned.
        """
        if self._last is not None and block not in self._called and not torch.equal(self._last[1], hidden):
            raise self._refusal(block, f"is not handed the hidden states as {self._last[0]} returned them")

    def leave(self, block: str, hidden: Tensor) -> None:
        """Is told the hidden states that a block returns."""
        self._last = block, hidden

    def watch(
        self,
        block: str,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        move: Callable[[Any], Any],
    ) -> Any:
        """Calls a block with its arguments moved, and checks what it did to them.

        Raises:
            UnsupportedModelError: it changed an argument that cannot be carried, or ran before; names block and
                argument.
        """
        if block in self._called:
            raise self._refusal(block, "runs more than once in one pass")
        self._called.add(block)
        given: dict[Argument, Any] = {**{position - 1: value for position, value in enumerate(args)}, **kwargs}
        self._note_taken(block, given)
        mappings = {name: value for name, value in given.items() if isinstance(value, MutableMapping)}
        ours = {name: move(value) for name, value in given.items() if name not in mappings}
        found = {name: moved(contents(name, mapping), move) for name, mapping in mappings.items()}
        ours |= {name: refilled(name, mapping, found[name]) for name, mapping in mappings.items()}
        before = {name: _marks(value) for name, value in ours.items() if name not in mappings}
        positional = [ours[position - 1] for position in range(len(args))]
        output = call(*positional, **{name: ours[name] for name in kwargs})
        for name, marks in before.items():
            if _marks(ours[name]) != marks:
                what = "hidden states" if name in (-1, "hidden_states") else f"argument {name!r}"
                raise self._refusal(block, f"changes its {what} ({type(ours[name]).__name__}) in place")
        for name, mapping in mappings.items():
            self._note(block, name, mapping, found[name], contents(name, ours[name]))
        others = enumerate(output[1:], 1) if isinstance(output, tuple | list) else ()
        self._returned += [(tensor, block, position) for position, other in others for tensor in tensors_of(other)]
        return output

    def _note_taken(self, block: str, given: Mapping[Argument, Any]) -> None:
        """Notes which arguments of a block are outputs of earlier ones."""
        for name, value in given.items():
            leaves = tree_leaves(value)
            found = [entry for entry in self._returned if any(leaf is entry[0] for leaf in leaves)]
            if found and found[-1][0] is not value:
                raise self._refusal(block, f"is handed an output of {found[-1][1]} inside its argument {name!r}")
            self.handed += [Handed(writer, position, block, name) for _, writer, position in found[-1:]]

    def _note(self, block: str, name: Argument, mapping: Any, found: State, after: State) -> None:
        entries = written(found, after)
        if not entries and name not in self.names:
            return
        if self._mappings.setdefault(name, mapping) is not mapping:
            raise self._refusal(block, f"gets a mapping of its own in argument {name!r}, where others share one")
        if set(found) - set(after):
            raise self._refusal(block, f"removes entries from its argument {name!r}")
        for key, entry in entries.items():
            tensors = tensors_of(entry)
            if not tensors or len(tensors) != len(tree_leaves(entry)):
                raise self._refusal(block, f"writes something else than tensors into its argument {name!r}")
            mapping[key[1]] = entry
            self._sizes[key] = sum(tensor.numel() for tensor in tensors)

    def _refusal(self, block: str, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self._model} is not supported: {block} {what}. svdllm carries hidden states, mappings of tensors "
            "that blocks write into, and tensors that they return, from block to block."
        )


def _marks(value: Any) -> Any:
    """A mark that differs once a block writes into the value: versions of tensors, identities of members."""
    if isinstance(value, Tensor):
        return value._version
    if isinstance(value, list | tuple):
        return [(id(member), _marks(member)) for member in value]
    if isinstance(value, set):
        return sorted(map(id, value))
    if isinstance(value, torch.nn.Module) or not hasattr(value, "__dict__"):
        return None
    return {name: id(member) for name, member in vars(value).items()}
