"""Finds the parameters of a model that are one tensor under several names."""

from __future__ import annotations

from torch import nn


def other_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Parameter -> the other names of the same tensor, for all that have several.

    A model shares the tensor itself, or lists which names it ties (``all_tied_weights_keys``) once there are values.
    """
    by_tensor: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(parameter), set()).add(name)
    groups = {name: names for names in by_tensor.values() for name in names}
    for name, origin in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        joined = groups.get(name, {name}) | groups.get(origin, {origin})
        groups |= dict.fromkeys(joined, joined)
    return {name: tuple(sorted(names - {name})) for name, names in groups.items() if len(names) > 1}
