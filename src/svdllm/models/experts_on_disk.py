"""Keeps the weights of experts on disk while their block is loaded, for blocks that do not fit into memory.

Each tensor is a mapped file. The pages of an expert are given back once it has been called and once its gradients are
known, so that little more than one expert is in memory.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdllm.common.disk import allocate
from svdllm.models.low_rank.lowrank import Expert, SplitExperts

DONTNEED = 4  # MADV_DONTNEED
PREFIX = ".experts-"


def on_disk(tensor: Tensor, folder: Path | None) -> Tensor:
    """Copies a tensor into a mapped file of a folder; without a folder it stays as it is.

    The file has no name, and goes with the tensor. Where files in use keep their names (Windows), it goes with the
    folder.

    Raises:
        OSError: the disk has no room for it.
    """
    if folder is None:
        return tensor
    handle, name = tempfile.mkstemp(prefix=PREFIX, dir=folder)
    os.close(handle)
    allocate(Path(name), tensor.nbytes)
    mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    with suppress(OSError):
        Path(name).unlink()
    give_back(mapped.copy_(tensor))
    return mapped


def give_back(*tensors: Tensor) -> None:
    """Frees the memory of tensors that are on disk, which are read again when they are needed; no others change."""
    for tensor in tensors if os.name == "posix" else ():
        storage = tensor.untyped_storage()
        if tensor.device.type == "cpu" and storage.filename is not None:
            _madvise()(storage.data_ptr(), storage.nbytes(), DONTNEED)


def _madvise() -> Callable[[int, int, int], int]:
    function: Any = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def placed_by(module: nn.Module, prefix: str, folder: Path | None) -> Callable[[str, Tensor], Tensor]:
    """Makes the function that puts the tensors of a module's experts on disk; without a folder it leaves all alone.

    Args:
        prefix: name of the module in the model.
    """
    experts = [(f"{prefix}.{name}", expert) for name, expert in module.named_modules() if isinstance(expert, Expert)]
    inside = {leaf for name, expert in experts for leaf, _ in expert.named_modules(prefix=name)}

    def place(name: str, tensor: Tensor) -> Tensor:
        return on_disk(tensor, folder if name.rpartition(".")[0] in inside else None)

    return place


@contextmanager
def experts_given_back(module: nn.Module) -> Iterator[None]:
    """Gives back the memory of every expert of a module when it is done, while the context lasts."""

    def after(expert: nn.Module, *_: Any) -> None:
        give_back(*expert.parameters())

    def before(expert: nn.Module, args: tuple[Any, ...]) -> None:
        if args[0].requires_grad:  # its gradient is known when those of the expert are
            args[0].register_hook(lambda _: after(expert))

    experts = [expert for expert in module.modules() if isinstance(expert, Expert)]
    handles = [expert.register_forward_hook(after) for expert in experts]
    handles += [expert.register_forward_pre_hook(before) for expert in experts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched_experts_only(module: nn.Module) -> Iterator[None]:
    """Leaves out experts whose linears have no hooks while the context lasts, if no other linear has any.

    The output of the module is not that of all experts then.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, SplitExperts)]
    own = {child for layer in layers for expert in layer.experts for child in expert.modules()} | set(layers)
    if any(_is_watched(child) for child in module.modules() if child not in own):
        yield
        return
    handles = [layer.register_forward_pre_hook(_routed_to_watched, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _routed_to_watched(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Routes the tokens of experts that nothing watches to none."""
    hidden, indices, weights = (*args, *kwargs.values())
    watched = torch.tensor([any(map(_is_watched, expert.children())) for expert in layer.experts])
    kept = watched.to(indices.device)[indices]
    return (hidden, torch.where(kept, indices, layer.split_count), weights), {}


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
