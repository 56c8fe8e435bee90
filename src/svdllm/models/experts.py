"""Names the tensors of single experts, where transformers keeps one for all experts of a layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from svdllm.models.low_rank.lowrank import SplitExperts

T = TypeVar("T")
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name -> shape and dtype


class ExpertTensor(NamedTuple):
    """The place of a tensor of one expert in the stacked tensor of all; ``transposed`` if its transpose is there."""

    stacked: str
    index: int
    transposed: bool


Places = Mapping[str, ExpertTensor]  # tensor of one expert -> its place


def expert_tensors(model: nn.Module) -> dict[str, ExpertTensor]:
    """Finds the tensors of single experts in a model with split experts, by layer and linear."""
    return {
        f"{name}.{index}.{leaf}.{kind}": ExpertTensor(f"{name}.{leaf}{suffix}", index, transposed)
        for name, module in model.named_modules()
        if isinstance(module, SplitExperts)
        for leaf in module.linear_names
        for kind, suffix, transposed in (("weight", "", module.is_transposed), ("bias", "_bias", False))
        if kind == "weight" or module.has_bias
        for index in range(module.split_count)
    }


def first_experts(model: nn.Module) -> dict[str, str]:
    """Linear of an expert -> the same linear of the first expert of its layer."""
    return {
        f"{name}.{index}.{leaf}": f"{name}.0.{leaf}"
        for name, module in model.named_modules()
        if isinstance(module, SplitExperts)
        for index in range(module.split_count)
        for leaf in module.linear_names
    }


def distinct_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields what ``named_modules`` does, but of the experts of a layer, which are alike, the first alone."""
    yield name, module
    only_first = isinstance(module, SplitExperts)
    for leaf, child in module.named_children():
        if not only_first or leaf == "0" or not leaf.isdecimal():
            yield from distinct_modules(child, f"{name}.{leaf}" if name else leaf)


def pool_of(name: str, places: Places) -> str | None:
    """The pool of a linear of an expert: those of the other experts of its layer, by the name of their tensor."""
    place = places.get(f"{name}.weight")
    return None if place is None else place.stacked


def known_tensors(model: nn.Module) -> dict[str, Any]:
    """The ``state_dict`` of a model, and one tensor of an expert under the name of each stacked tensor."""
    state = model.state_dict()
    return {place.stacked: state[name] for name, place in expert_tensors(model).items() if name in state} | state


def _by_stack(places: Places) -> dict[str, dict[str, ExpertTensor]]:
    """Stacked tensor -> the tensors of single experts in it, with their places."""
    stacks: dict[str, dict[str, ExpertTensor]] = {}
    for name, place in places.items():
        stacks.setdefault(place.stacked, {})[name] = place
    return stacks


def split_tensors(tensors: Mapping[str, T], places: Places, part: Callable[[T, ExpertTensor], T]) -> dict[str, T]:
    """Replaces stacked tensors by those of the experts, where these are not there themselves."""
    stacks = _by_stack(places)
    result: dict[str, T] = {}
    for name, tensor in tensors.items():
        parts = stacks.get(name)
        result |= {name: tensor} if parts is None else {own: part(tensor, place) for own, place in parts.items()}
    return result


class Readable(Protocol):
    """Tensors by name."""

    def get(self, name: str) -> Tensor: ...


class Stacked:
    """The tensors of a model whose experts are split, with those of some layers stacked as transformers has them.

    Args:
        places: the tensors of experts that are stacked.
    """

    def __init__(self, tensors: Readable, places: Places):
        self._tensors, self._parts = tensors, _by_stack(places)

    def get(self, name: str) -> Tensor:
        parts = self._parts.get(name)
        if parts is None:
            return self._tensors.get(name)
        values = ((self._tensors.get(own), place.transposed) for own, place in parts.items())
        return torch.stack([value.mT if transposed else value for value, transposed in values]).contiguous()


def stacked_layout(layout: Layout, places: Places) -> Layout:
    """The names, shapes and dtypes of a model once the tensors of some experts are stacked."""
    stacks = _by_stack(places)
    result: Layout = {}
    for name, (shape, dtype) in layout.items():
        place = places.get(name)
        if place is None:
            result[name] = shape, dtype
        elif place.stacked not in result:
            own = shape[::-1] if place.transposed else shape
            result[place.stacked] = (len(stacks[place.stacked]), *own), dtype
    return result


def untouched(places: Places, linears: Collection[str]) -> dict[str, ExpertTensor]:
    """The tensors of the layers' experts of which none of the named linears is one: these layers stay stacked."""
    touched = {places[f"{name}.weight"].stacked.rpartition(".")[0] for name in linears if f"{name}.weight" in places}
    return {name: place for name, place in places.items() if place.stacked.rpartition(".")[0] not in touched}


@contextmanager
def experts_tried(model: nn.Module) -> Iterator[None]:
    """Hands every token to the first expert of each layer while the context lasts: values decide nothing.

    The output is that of the tokens that are routed to it.
    """
    modules = [module for module in model.modules() if isinstance(module, SplitExperts)]
    for module in modules:
        module.tried = 1
    try:
        yield
    finally:
        for module in modules:
            module.tried = 0


class Routing:
    """Routes the tokens of one run of a module as those of another run."""

    def __init__(self, module: nn.Module):
        self._experts = [child for child in module.modules() if isinstance(child, SplitExperts)]
        self._given: dict[nn.Module, tuple[Any, ...]] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Notes how tokens are routed while the context lasts."""

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._given[module] = (*args, *kwargs.values())[1:]

        with self._hooked(note):
            yield

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Routes tokens as noted while the context lasts."""

        def route(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return ((*args, *kwargs.values())[0], *self._given[module]), {}

        with self._hooked(route):
            yield

    @contextmanager
    def _hooked(self, hook: Callable[..., Any]) -> Iterator[None]:
        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in self._experts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
