"""Describes the weights inside the blocks that stay as they are, and why."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from svdllm.models.linears import has_matrix, is_linear
from svdllm.models.ties import other_names
from svdllm.models.unused_tensors import grouped_names

IGNORED = "left out by --ignore"
NO_LINEAR = "not a linear"
OWN_FORWARD = "computes more than a product"
SHARED = "shared with another module"
UNCALLED = "not called in a trial pass"
READ = "its weight is read without calling it"
TOO_SMALL = "too small to gain"


@dataclass(frozen=True, kw_only=True)
class DenseModule:
    """A module in a block whose own parameters stay as they are; ``kind`` is its class."""

    name: str
    kind: str
    reason: str
    params: int


@dataclass(frozen=True, kw_only=True)
class DensePart:
    """All modules of one class that stay as they are for one reason.

    names: short forms of their names, see ``grouped_names``.
    share: of all parameters in the blocks.
    """

    kind: str
    reason: str
    names: list[str]
    params: int
    share: float

    @property
    def text(self) -> str:
        """The share, the class, the names and the reason in one line."""
        reason = "" if self.reason == NO_LINEAR else f": {self.reason}"
        shown = ", ".join(self.names[:3]) + (f" and {len(self.names) - 3} more" if len(self.names) > 3 else "")
        return f"{self.share:.2%} {self.kind} ({shown}){reason}"


def dense_modules(
    owners: Iterable[tuple[str, nn.Module, int]], targets: Collection[str], reasons: Mapping[str, str]
) -> tuple[DenseModule, ...]:
    """Lists the modules in the blocks that have parameters and are not targets.

    Args:
        owners: see ``parameter_owners``.
        reasons: linear -> why it is not a target.
    """
    found = []
    for name, module, params in owners:
        if name not in targets:
            reason = reasons.get(name, OWN_FORWARD if has_matrix(module) and not is_linear(module) else NO_LINEAR)
            found.append(DenseModule(name=name, kind=type(module).__name__, reason=reason, params=params))
    return tuple(found)


def dense_parts(modules: Collection[DenseModule], num_block_params: int) -> list[DensePart]:
    """Groups modules by class and reason, the largest part first."""
    groups: dict[tuple[str, str], list[DenseModule]] = {}
    for module in modules:
        groups.setdefault((module.kind, module.reason), []).append(module)
    parts = [
        DensePart(
            kind=kind,
            reason=reason,
            names=grouped_names((member.name for member in members), (member.name for member in members)),
            params=(params := sum(member.params for member in members)),
            share=params / num_block_params,
        )
        for (kind, reason), members in groups.items()
    ]
    return sorted(parts, key=lambda part: -part.params)


def shared_modules(model: nn.Module) -> set[str]:
    """Names of the modules with a parameter that another place of the model has too."""
    return {name.rpartition(".")[0] for name in other_names(model)}


def parameter_owners(model: nn.Module, blocks: Collection[str]) -> Iterator[tuple[str, nn.Module, int]]:
    """Yields every module in the blocks that owns parameters, with their number; shared ones count at their first."""
    seen: set[int] = set()
    for block in blocks:
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            own = {id(parameter): parameter for parameter in module._parameters.values() if parameter is not None}
            first = own.keys() - (own.keys() & seen)  # not less ``seen``, which is looked through as a whole
            if first:
                yield name, module, sum(own[key].numel() for key in first)
            seen |= first
