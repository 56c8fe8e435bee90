"""The walk through a model with one decoder block resident.

A *skeleton pass* runs the model with its blocks replaced by recorders, so only embeddings and position machinery do
work: it yields the hidden states that enter the first block and, for every block, the arguments it is called with.
Then each block is loaded, run over all batches (its outputs take the place of its inputs) and freed. Masks, rotary
tables and per-layer variants are thus right for any architecture without knowing it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from transformers import PreTrainedModel

from svdllm.errors import NumericalError
from svdllm.structure import Structure, replaced, to_device
from svdllm.weights import Weights


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


class HiddenStates:
    """Hidden states of all windows (``windows x seqlen x hidden``), in RAM or in a memory-mapped file."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, file: Path | None = None):
        if file is None:
            self.tensor = torch.empty(shape, dtype=dtype)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            size = shape[0] * shape[1] * shape[2]
            self.tensor = torch.from_file(str(file), shared=True, size=size, dtype=dtype).view(shape)


@dataclass
class Walk:
    """Carries windows of tokens through a model, block by block.

    ``on_batch(block, batch)`` is called after each batch of each block (progress).
    """

    weights: Weights
    skeleton: PreTrainedModel
    structure: Structure
    ids: Tensor  # windows x seqlen
    device: torch.device
    dtype: torch.dtype
    batch_tokens: int = 4096
    spill_file: Path | None = None
    on_batch: Callable[[int, int, int], None] | None = None
    hidden: HiddenStates = field(init=False)
    calls: list[list[Call]] = field(init=False)  # per batch, per block

    @property
    def batches(self) -> list[slice]:
        size = max(1, self.batch_tokens // self.ids.shape[1])
        return [slice(start, min(start + size, len(self.ids))) for start in range(0, len(self.ids), size)]

    def blocks(self) -> Iterator[Block]:
        """Runs the skeleton pass, then yields each block, loaded; after the yield its memory is free again."""
        self._skeleton_pass()
        for index, name in enumerate(self.structure.blocks):
            module = self.skeleton.get_submodule(name)
            with resident(module, name, self.weights, self.device, self.dtype):
                yield Block(walk=self, index=index, name=name, module=module)

    def close(self) -> None:
        """Forgets the hidden states, and their file."""
        del self.hidden
        if self.spill_file is not None:
            self.spill_file.unlink(missing_ok=True)

    def logits(self) -> Tensor:
        """Logits of all windows, after the walk: what follows the blocks, fed with the carried hidden states."""
        blocks = self.structure.blocks
        outputs = []
        with self._outside_resident(everything=True):
            for batch in self.batches:
                last = _Replay(
                    self.skeleton.get_submodule(blocks[-1]), self.hidden.tensor[batch], self.structure.returns_tuple[-1]
                )
                others = {
                    name: _Recorder(self.skeleton.get_submodule(name), returns_tuple)
                    for name, returns_tuple in zip(blocks[:-1], self.structure.returns_tuple[:-1], strict=True)
                }
                with replaced(self.skeleton, {**others, blocks[-1]: last}), torch.no_grad():
                    ids = self.ids[batch].to(self.device)
                    outputs.append(self.skeleton(input_ids=ids, use_cache=False).logits.float().cpu())
        return torch.cat(outputs)

    def _skeleton_pass(self) -> None:
        self.calls = []
        recorders = {
            name: _Recorder(self.skeleton.get_submodule(name), returns_tuple)
            for name, returns_tuple in zip(self.structure.blocks, self.structure.returns_tuple, strict=True)
        }
        with self._outside_resident(everything=False), replaced(self.skeleton, dict(recorders)), torch.no_grad():
            for batch in self.batches:
                self.skeleton.base_model(input_ids=self.ids[batch].to(self.device), use_cache=False)
                recorded = list(recorders.values())
                first = recorded[0].hidden
                if not self.calls:
                    shape = (len(self.ids), self.ids.shape[1], first.shape[-1])
                    self.hidden = HiddenStates(shape, self.dtype, self.spill_file)
                self.hidden.tensor[batch] = first.cpu()
                self.calls.append(self._shared([recorder.call for recorder in recorded]))

    def _shared(self, calls: list[Call]) -> list[Call]:
        """Calls of a batch, those of an earlier batch where they are equal: the arguments rarely depend on the text."""
        known = [call for batch in self.calls[:1] for call in batch]
        return [next((other for other in known if other.same_as(call)), call) for call in calls]

    @contextmanager
    def _outside_resident(self, *, everything: bool):
        """What is not in a block has its weights while the context lasts; the head only if asked for."""
        inside = tuple(f"{name}." for name in self.structure.blocks)
        root = self.skeleton if everything else self.skeleton.base_model
        prefix = "" if root is self.skeleton else f"{self.skeleton.base_model_prefix}."
        with resident(root, prefix[:-1], self.weights, self.device, self.dtype, skip=inside):
            if everything:
                self.skeleton.tie_weights()
            yield


@dataclass(frozen=True)
class Block:
    """A loaded block of a walk."""

    walk: Walk
    index: int
    name: str
    module: nn.Module

    def run(self, after_batch: Callable[[], None] | None = None) -> None:
        """Runs every batch; the outputs take the place of the inputs.

        Raises:
            NumericalError: a hidden state is NaN or infinite; names block and batch.
        """
        walk = self.walk
        for number, batch in enumerate(walk.batches):
            with torch.no_grad():
                hidden = walk.hidden.tensor[batch].to(walk.device)
                output = walk.calls[number][self.index].run(self.module, hidden)
            if after_batch is not None:
                after_batch()
            if not bool(torch.isfinite(output).all()):
                raise NumericalError(
                    f"The output of block {self.index} ({self.name}) has NaN or infinite values in batch {number} "
                    f"(windows {batch.start} to {batch.stop - 1}). If it computes in float16, try --dtype float32."
                )
            walk.hidden.tensor[batch] = output.to("cpu", walk.dtype)
            if walk.on_batch is not None:
                walk.on_batch(self.index, number + 1, len(walk.batches))


@contextmanager
def resident(
    module: nn.Module,
    prefix: str,
    weights: Weights,
    device: torch.device,
    dtype: torch.dtype,
    skip: tuple[str, ...] = (),
):
    """A module on the meta device has its weights while the context lasts (floating ones cast to ``dtype``)."""
    stored = set(weights.names())
    places = []
    for owner, child in module.named_modules(prefix=prefix):
        for leaf, tensor in [*child._parameters.items(), *child._buffers.items()]:
            name = f"{owner}.{leaf}" if owner else leaf
            if tensor is not None and not name.startswith(skip or ("\0",)):
                places.append((child, leaf, tensor, name))
    try:
        for child, leaf, tensor, name in places:
            if name in stored:
                value = weights.get(name)
                value = value.to(device, dtype) if value.is_floating_point() else value.to(device)
                _put(child, leaf, value)
            elif not tensor.is_meta:
                _put(child, leaf, tensor.to(device))
        yield module
    finally:
        for child, leaf, tensor, _ in places:
            if leaf in child._parameters:
                child._parameters[leaf] = tensor
            else:
                child._buffers[leaf] = tensor


class _StandIn(nn.Module):
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


class _Recorder(_StandIn):
    """Keeps what its block is called with and hands the hidden states on unchanged."""

    hidden: Tensor
    call: Call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        by_name = not args
        self.hidden = kwargs.pop("hidden_states") if by_name else args[0]
        self.call = Call(args[1:], kwargs, by_name)
        return self.wrapped(self.hidden)


class _Replay(_StandIn):
    """Answers with hidden states computed before."""

    def __init__(self, block: nn.Module, hidden: Tensor, returns_tuple: bool):
        super().__init__(block, returns_tuple)
        self.__dict__["replayed"] = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return self.wrapped(self.__dict__["replayed"].to(given.device))


def _put(module: nn.Module, leaf: str, value: Tensor) -> None:
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return ours is theirs or (
            ours.shape == theirs.shape and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        )
    if isinstance(ours, Tensor) or isinstance(theirs, Tensor):
        return False
    return ours is theirs or ours == theirs
