"""Stubs that take the place of decoder blocks while the rest of the model runs, and recorded calls of blocks."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from svdllm.common.errors import UnsupportedModelError
from svdllm.models.hooks import to_device
from svdllm.models.shared_state import NOTHING, Argument, Key, Ports, State, contents, moved, refilled, written

UNCONNECTED = Ports()


class Ran(NamedTuple):
    """The outputs of a block: hidden states, and the entries that it wrote into the shared state."""

    hidden: Tensor
    written: State


@dataclass(frozen=True)
class Call:
    """The arguments of a block for one batch, without the hidden states and the shared state.

    shared: the mappings that blocks write into, as they were before any block had run.
    takes, hands: see ``Ports``.
    batch_dim: the dimension of texts in the hidden states as the block takes them; here it is the first.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_by_name: bool
    shared: dict[Argument, MutableMapping[Any, Any]] = field(default_factory=dict)
    takes: Mapping[Argument, Key] = field(default_factory=dict)
    hands: Mapping[int, Key] = field(default_factory=dict)
    batch_dim: int = 0

    def run(self, block: nn.Module, hidden: Tensor, state: State = NOTHING) -> Ran:
        """Runs a block on hidden states and a shared state; ``state`` is not changed."""
        found = moved(state, lambda tensor: tensor.to(hidden.device))
        shared = {argument: refilled(argument, mapping, found) for argument, mapping in self.shared.items()}
        filled = {**shared, **{argument: found[key] for argument, key in self.takes.items()}}
        args = to_device(self.args, hidden.device)
        args = tuple(filled.get(position, value) for position, value in enumerate(args))
        kwargs = to_device(self.kwargs, hidden.device)
        kwargs |= {argument: value for argument, value in filled.items() if isinstance(argument, str)}
        given = hidden.movedim(0, self.batch_dim)
        output = block(hidden_states=given, **kwargs) if self.hidden_by_name else block(given, *args, **kwargs)
        after: dict[Any, Any] = {key: output[position] for position, key in self.hands.items()}
        for argument, mapping in shared.items():
            after |= contents(argument, mapping)
        made = output[0] if isinstance(output, tuple | list) else output
        return Ran(made.movedim(self.batch_dim, 0), written(found, after))

    def same_as(self, other: Call) -> bool:
        """Whether two calls are equal by value, so that one copy can serve both."""
        ours, our_shape = tree_flatten(self._values())
        theirs, their_shape = tree_flatten(other._values())
        return our_shape == their_shape and all(map(_same, ours, theirs))

    def _values(self) -> Any:
        shared = {argument: dict(mapping) for argument, mapping in self.shared.items()}
        return self.args, self.kwargs, shared, dict(self.takes), dict(self.hands), self.batch_dim


class BlockStub(nn.Module):
    """Takes the place of a block. Attributes that the model reads from the block come from the block."""

    def __init__(self, block: nn.Module, num_outputs: int, batch_dim: int = 0):
        super().__init__()
        self.__dict__["block"] = block  # not a submodule, so that its weights are not the stub's
        self.num_outputs, self.batch_dim = num_outputs, batch_dim

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def wrapped(self, hidden: Tensor, others: Mapping[int, Any] = MappingProxyType({})) -> Any:
        """The output of the block: hidden states, in a tuple with ``others`` by their positions if it returns one."""
        return (hidden, *map(others.get, range(1, self.num_outputs))) if self.num_outputs else hidden


class Skip(BlockStub):
    """Returns the hidden states unchanged."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped(args[0] if args else kwargs["hidden_states"])


class Recorder(BlockStub):
    """Records the call of its block in one pass and returns the hidden states unchanged.

    ``markers`` (key -> tensor), one mapping for all blocks, stand for the outputs that later blocks take.
    """

    hidden: Tensor
    call: Call | None = None

    def __init__(
        self,
        block: nn.Module,
        num_outputs: int,
        batch_dim: int = 0,
        ports: Ports = UNCONNECTED,
        markers: Mapping[Key, Tensor] | None = None,
    ):
        super().__init__(block, num_outputs, batch_dim)
        self.ports, self.markers = ports, markers or {}

    def taken(self) -> Call:
        """Hands over the call, so that the next pass can be recorded."""
        call, self.call = self.call, None
        if call is None:
            raise UnsupportedModelError(f"A block ({type(self.block).__name__}) is not run with every text.")
        return call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.call is not None:
            raise UnsupportedModelError(
                f"A block ({type(self.block).__name__}) runs more than once in one pass; svdllm could tell its calls "
                "apart neither in its statistics nor in its weights."
            )
        by_name = not args
        given_hidden = kwargs.pop("hidden_states") if by_name else args[0]
        self.hidden = given_hidden.movedim(self.batch_dim, 0)
        others = args[1:]
        given: dict[Any, Any] = {**dict(enumerate(others)), **kwargs}
        shared = {argument: given[argument] for argument in self.ports.shared if argument in given}
        takes = {name: key for name, key in self.ports.takes.items() if given.get(name) is self.markers[key]}
        filled = {*shared, *takes}
        others = tuple(None if position in filled else value for position, value in enumerate(others))
        kwargs = {name: value for name, value in kwargs.items() if name not in filled}
        self.call = Call(others, kwargs, by_name, shared, takes, self.ports.hands, self.batch_dim)
        return self.wrapped(given_hidden, {place: self.markers[key] for place, key in self.ports.hands.items()})


class Replay(BlockStub):
    """Returns hidden states that were computed before."""

    def replay(self, hidden: Tensor) -> None:
        self.__dict__["replayed"] = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return self.wrapped(self.__dict__["replayed"].movedim(0, self.batch_dim).to(given.device))


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return ours is theirs or (
            ours.shape == theirs.shape and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        )
    if isinstance(ours, Tensor) or isinstance(theirs, Tensor):
        return False
    return ours is theirs or ours == theirs
