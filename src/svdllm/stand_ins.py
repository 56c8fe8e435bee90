"""What stands in the place of a decoder block while the rest of its model runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from svdllm.structure import to_device


@dataclass(frozen=True)
class Call:
    """How a block is called for one batch, the hidden states apart."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_by_name: bool

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        kwargs = to_device(self.kwargs, hidden.device)
        args = to_device(self.args, hidden.device)
        output = block(hidden_states=hidden, **kwargs) if self.hidden_by_name else block(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def same_as(self, other: Call) -> bool:
        """Equal by value, so that one copy can serve both."""
        ours, our_shape = tree_flatten((self.args, self.kwargs))
        theirs, their_shape = tree_flatten((other.args, other.kwargs))
        return our_shape == their_shape and all(map(_same, ours, theirs))


class StandIn(nn.Module):
    """Stands in the place of a block; whatever else the model asks of the block is answered by the block."""

    def __init__(self, block: nn.Module, returns_tuple: bool):
        super().__init__()
        self.__dict__["block"] = block  # not a submodule: its weights are not ours
        self.returns_tuple = returns_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def wrapped(self, hidden: Tensor) -> Any:
        return (hidden, None) if self.returns_tuple else hidden


class Recorder(StandIn):
    """Keeps what its block is called with and hands the hidden states on unchanged."""

    hidden: Tensor
    call: Call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        by_name = not args
        self.hidden = kwargs.pop("hidden_states") if by_name else args[0]
        self.call = Call(args[1:], kwargs, by_name)
        return self.wrapped(self.hidden)


class Replay(StandIn):
    """Answers with hidden states computed before."""

    def replay(self, hidden: Tensor) -> None:
        self.__dict__["replayed"] = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return self.wrapped(self.__dict__["replayed"].to(given.device))


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return ours is theirs or (
            ours.shape == theirs.shape and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        )
    if isinstance(ours, Tensor) or isinstance(theirs, Tensor):
        return False
    return ours is theirs or ours == theirs
