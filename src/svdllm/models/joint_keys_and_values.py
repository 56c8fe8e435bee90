"""Makes keys and values of a layer one target with one first factor."""

from __future__ import annotations

from dataclasses import replace

from svdllm.common.errors import UnsupportedModelError
from svdllm.models.linears import listing
from svdllm.models.structure import Structure, Target


def with_joint_keys_and_values(structure: Structure) -> Structure:
    """Makes ``k_proj`` and ``v_proj`` of every layer one target, as in multi-head latent attention.

    A pair stays apart if one of the two is ignored, or only one of them has a bias.

    Raises:
        UnsupportedModelError: no layer has such a pair.
    """
    by_name = {target.name: target for target in structure.targets}
    joint: dict[str, Target] = {}
    for keys in structure.targets:
        parent, _, leaf = keys.name.rpartition(".")
        values = by_name.get(f"{parent}.v_proj")
        if leaf == "k_proj" and values and (values.group, values.has_bias) == (keys.group, keys.has_bias):
            joint[keys.name] = joint[values.name] = _joint(keys, values)
    if not joint:
        raise UnsupportedModelError(
            "--joint-kv needs a layer whose k_proj and v_proj read the same tensor and may both be compressed, found "
            f"the linears {listing([target.name for target in structure.targets])}. Leave out --joint-kv."
        )
    targets = dict.fromkeys(joint.get(target.name, target) for target in structure.targets)
    renamed = {name: target.name for name, target in joint.items()}
    groups = (replace(target, group=renamed.get(target.group, target.group)) for target in targets)
    mlps = (mlp for mlp in structure.mlps if joint.keys().isdisjoint(mlp.linears))
    return replace(structure, targets=tuple(groups), mlps=tuple(mlps))


def _joint(keys: Target, values: Target) -> Target:
    return replace(
        keys,
        name=f"{keys.name}+{values.name.rpartition('.')[2]}",
        out_features=keys.out_features + values.out_features,
        parts=((keys.name, keys.out_features), (values.name, values.out_features)),
    )
