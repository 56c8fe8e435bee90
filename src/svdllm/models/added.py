"""Follows the output of a module through the additions after it: finds the residual stream that it is added to."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
PRODUCTS = (torch.ops.aten.mul.Tensor, torch.ops.aten.mul_.Tensor)


class Read(NamedTuple):
    """The inputs of a module, and the tensors that its output is added to, summed; None if it is added to nothing."""

    inputs: Tensor
    added: Tensor | None

    def lacking(self, other: Read) -> Tensor | None:
        """What the tensors of another run lack beside these; None if either output is added to nothing."""
        return None if self.added is None or other.added is None else self.added - other.added


class Followed(Exception):
    """Ends a run early: the sum is read by something that adds nothing to it."""


class Added(TorchDispatchMode):
    """Sums what is added to a tensor before anything else reads the sum: in ``h + o_proj(x)``, ``h``.

    A multiplication by a number on the way is undone: in ``h + 0.2 * o_proj(x)``, ``total`` is ``h / 0.2``.

    Args:
        ends_run: raises ``Followed`` when the sum is complete.

    Attributes:
        total: the sum, in the shape of the followed tensor; None if nothing was added.
    """

    total: Tensor | None = None

    def __init__(self, *, ends_run: bool = True) -> None:
        super().__init__()
        self._ends_run = ends_run
        self._followed: Tensor | None = None
        self._scale = 1.0

    def follow(self, output: Any) -> None:
        """Follows a tensor from here on."""
        self._followed = output if isinstance(output, Tensor) else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        followed, kwargs = self._followed, kwargs or {}
        if followed is None or not any(leaf is followed for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        other = args[1] if len(args) > 1 and args[0] is followed else args[0]
        if func in ADDITIONS and not kwargs and isinstance(other, Tensor) and other.shape == followed.shape:
            added = other / self._scale  # a copy: an addition in place overwrites it
            self.total = added if self.total is None else self.total + added
        elif func in PRODUCTS and not isinstance(other, Tensor) and other:
            self._scale *= other
        elif self._ends_run:
            raise Followed
        else:
            self._followed = None
            return func(*args, **kwargs)
        self._followed = func(*args, **kwargs)
        return self._followed
