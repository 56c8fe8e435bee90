"""Finds how an attention layer turns the output of ``k_proj`` into keys: which norm, and which rotation.

Shapes: ``B`` batch, ``H`` heads of keys, ``S`` slots of the cache, ``D`` width of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import permutations, product
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from svdllm.inference.cache_names import cache_name


class Step(Protocol):
    def __call__(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Applies the step to ``keys`` (B, H, S, D), which it may overwrite; ``cos`` and ``sin`` (S, rotated width)."""
        ...


class Norm(NamedTuple):
    """A norm of each head, or of all heads of a token together."""

    module: nn.Module
    of_all_heads: bool

    def __call__(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not self.of_all_heads:
            return self.module(keys)
        heads = keys.shape[1]
        return self.module(keys.transpose(1, 2).flatten(-2)).unflatten(-1, (heads, -1)).transpose(1, 2)


class Rotation(NamedTuple):
    """A rotation of pairs of entries of a head.

    interleaved: pairs are neighbours; otherwise they are half of the width apart.
    repeated: ``cos`` has each angle twice in a row; otherwise all angles in order, twice.
    """

    interleaved: bool
    repeated: bool

    def __call__(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        width = cos.shape[-1]
        half = width // 2
        first, second = (
            (keys[..., 0:width:2], keys[..., 1:width:2])
            if self.interleaved
            else (keys[..., :half], keys[..., half:width])
        )
        angles = slice(0, width, 2) if self.repeated else slice(0, half)
        cos, sin = cos[:, angles], sin[:, angles]
        from_first = first * sin
        first.mul_(cos).addcmul_(second, sin, value=-1)
        second.mul_(cos).add_(from_first)
        return keys


class Positions:
    """Cosines and sines of the slots 0, 1, 2, ... by the model's rotary module, kept for all layers."""

    def __init__(self, rotary: nn.Module, layer_type: str | None):
        self.rotary, self.layer_type = rotary, layer_type
        self._table: tuple[Tensor, Tensor] | None = None

    @property
    def kind(self) -> str:
        kinds = getattr(self.rotary, "rope_type", "default")
        return kinds.get(self.layer_type, "default") if isinstance(kinds, dict) else kinds

    @property
    def change_with_length(self) -> bool:
        """Whether angles depend on the length of the text; keys rotated in a shorter text cannot be rebuilt then."""
        return self.kind in ("dynamic", "longrope")

    def table(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each (``length`` or more, rotated width), in the dtype and on the device of ``like``."""
        table = self._table
        if (
            table is None
            or table[0].shape[0] < length
            or (table[0].dtype, table[0].device) != (like.dtype, like.device)
        ):
            self._table = table = self._compute(max(length, 2 * table[0].shape[0] if table else 0), like)
        return table

    def _compute(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        slots = torch.arange(length, device=like.device)[None]
        layer_type = () if self.layer_type is None else (self.layer_type,)
        cos, sin = self.rotary(like, slots, *layer_type)
        return cos[0].mT.contiguous().mT, sin[0].mT.contiguous().mT


class Seen:
    """Records an attention layer's first forward pass with a cache, whose place it takes for this pass.

    projected: outputs (B, S, H * D) by the name of the linear.
    position_embeddings: cosines and sines (B or 1, S, rotated width), or None.
    keys, values: (B, H, S, D), as they are cached.
    """

    def __init__(self) -> None:
        self.cache: Any = None
        self.projected: dict[str, Tensor] = {}
        self.position_embeddings: Any = None
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["cache"], name)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.keys, self.values = keys.clone(), values.clone()
        return self.cache.update(keys, values, *args, **kwargs)

    def enter(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        name = cache_name(layer)
        if self.cache is not None or kwargs.get(name) is None:
            return None
        self.cache, self.position_embeddings = kwargs[name], kwargs.get("position_embeddings")
        return args, {**kwargs, name: self}

    def note(self, name: str, output: Tensor) -> None:
        self.projected.setdefault(name, output.clone())


@contextmanager
def watched(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Seen]]:
    """Records what passes through each of the layers while the context lasts: name -> record."""
    seen = {name: Seen() for name in layers}
    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(seen[name].enter, with_kwargs=True))
            for linear in ("k_proj", "v_proj"):
                note = partial(seen[name].note, linear)
                handles.append(
                    layer.get_submodule(linear).register_forward_hook(lambda _, args, output, note=note: note(output))
                )
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class KeyPath(NamedTuple):
    """The steps from the output of ``k_proj`` to keys, with ``positions`` if one of them is a rotation."""

    steps: tuple[Step, ...]
    positions: Positions | None


def find_key_path(attention: nn.Module, seen: Seen, positions: list[Positions]) -> KeyPath | None:
    """Tries the layer's norms with rotations; returns the first combination that gives the recorded keys, or None."""
    assert seen.keys is not None
    heads = seen.projected["k_proj"].unflatten(-1, (-1, seen.keys.shape[-1])).transpose(1, 2)
    table = _same_positions(seen.position_embeddings, seen.keys, positions)
    no_rotation = torch.empty(seen.keys.shape[-2], 0)
    cos, sin = (part[: seen.keys.shape[-2]] for part in table.table(0, seen.keys)) if table else (no_rotation,) * 2
    for steps in _candidates(attention, table is not None):
        if _makes(steps, heads.clone(), cos, sin, seen.keys):
            rotates = any(isinstance(step, Rotation) for step in steps)
            return KeyPath(steps, table if rotates else None)
    return None


def _candidates(attention: nn.Module, may_rotate: bool) -> Iterator[tuple[Step, ...]]:
    modules = [child for name, child in attention.named_children() if name.startswith("k") and name != "k_proj"]
    norms: list[Step] = [Norm(module, together) for module, together in product(modules, (False, True))]
    rotations = [Rotation(False, False), Rotation(True, False), Rotation(True, True)] if may_rotate else []
    yield ()
    yield from ((step,) for step in [*norms, *rotations])
    for norm, rotation in product(norms, rotations):
        yield from permutations((norm, rotation))


def _makes(steps: tuple[Step, ...], keys: Tensor, cos: Tensor, sin: Tensor, expected: Tensor) -> bool:
    try:
        for step in steps:
            keys = step(keys, cos, sin)
    except (RuntimeError, TypeError):  # a norm of another width
        return False
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    return keys.shape == expected.shape and bool((keys - expected).norm() <= tolerance * expected.norm())


def _same_positions(given: Any, like: Tensor, positions: list[Positions]) -> Positions | None:
    """Finds the positions whose cosines and sines a layer was given, or None."""
    if not (isinstance(given, tuple) and len(given) == 2 and given[0].ndim == 3):
        return None
    length = given[0].shape[1]
    for candidate in positions:
        cos, sin = candidate.table(length, like)
        if cos[:length].shape == given[0].shape[1:] and all(
            torch.allclose(table[:length], part[:1], atol=1e-3) for table, part in zip((cos, sin), given, strict=True)
        ):
            return candidate
    return None


def rotary_modules(model: nn.Module, layer_types: list[str]) -> list[Positions]:
    """Lists the model's rotary modules, once for each type of layer that they distinguish."""
    found = []
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            typed = "layer_type" in inspect.signature(module.forward).parameters
            found += [Positions(module, layer_type) for layer_type in (layer_types if typed else [None])]
    return found
