"""The tensors of a compressed model by the forms of its targets, and what its config.json says about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch

from svdllm.checkpoint.integers import integer_config
from svdllm.checkpoint.tensors import Tensors
from svdllm.compression.forms import FORMS, Form, bits_of
from svdllm.compression.forms.bits import BASE, GROUP_SIZES, group_size_of, is_own_module
from svdllm.models.chosen import Chosen, Forms
from svdllm.models.structure import Structure, Target

# Of the parts of a linear whose dtype is not the source's.
INTEGER_DTYPES = {
    "order": torch.int32,
    "weight_packed": torch.int32,
    "packed_codes": torch.int32,
    "weight_shape": torch.int64,
}


@lru_cache(maxsize=2**17)
def params(target: Target, chosen: Chosen | None) -> int:
    """Number of weights of a target in a form, with those that a bias correction adds; None is the dense matrix."""
    if chosen is None or FORMS[chosen.form].bits is not None:
        return target.num_weights
    if FORMS[chosen.form].curve == "correction":
        return target.num_weights + chosen.size * (target.in_features + target.out_features)
    if (base := FORMS[chosen.form].base) is not None:
        return params(target, Chosen(base.name, chosen.size))
    tensors = (FORMS[chosen.form].shapes(target, linear, chosen.size) for linear in target.linears)
    weights = sum(prod(shape) for shapes in tensors for leaf, shape in shapes.items() if leaf.endswith("weight"))
    return weights + target.added_params * FORMS[chosen.form].adds_bias


@lru_cache(maxsize=2**17)
def params_beside_biases(target: Target, chosen: Chosen | None) -> int:
    """``params`` less the biases that a narrower MLP has no more: what a target adds to a model with all its biases."""
    if chosen is None or not target.has_bias:
        return params(target, chosen)
    tensors = (FORMS[chosen.form].shapes(target, linear, chosen.size) for linear in target.linears)
    biases = sum(prod(shape) for shapes in tensors for leaf, shape in shapes.items() if leaf.endswith("bias"))
    return params(target, chosen) + biases - target.out_features


def compressed_tensors(stored: Tensors, targets: Sequence[Target], forms: Forms) -> Tensors:
    """The tensors in the compressed model's files; those of a form take the place of a target's weights and biases."""
    owners = {name: target for target in targets if target.name in forms for name in target.linears}
    result: Tensors = {}
    for name, (shape, dtype) in stored.items():
        owner, _, leaf = name.rpartition(".")
        target = owners.get(owner)
        if target is None:
            result[name] = (shape, dtype)
        elif leaf == "weight":
            chosen = forms[target.name]
            _, bias_dtype = stored.get(f"{owner}.bias", (shape, dtype if target.added_params else None))
            dtypes = INTEGER_DTYPES | dict.fromkeys(("weight", "weight_scale", "packed_scales"), dtype)
            dtypes |= {"bias": bias_dtype}
            for part, own_shape in FORMS[chosen.form].shapes(target, owner, chosen.size).items():
                if (own_dtype := dtypes[part.rpartition(".")[2]]) is not None:
                    result[f"{owner}.{part}"] = (own_shape, own_dtype)
    return result


def elastic_tensors(structure: Structure, stored: Tensors, spare: Forms) -> Tensors:
    """The tensors in the elastic files: the energies of every target, and factors of the ``spare`` sizes."""
    energies: Tensors = {f"{t.name}.energies": ((t.full_rank,), torch.float64) for t in structure.targets}
    dense = {f"{n}.weight": stored[f"{n}.weight"] for t in structure.targets if t.name in spare for n in t.linears}
    return energies | compressed_tensors(dense, structure.targets, spare)


def forms_entry(targets: Sequence[Target], forms: Forms) -> dict[str, Any]:
    """The forms as ``config.json`` holds them: by linear, with the linears that share a first factor."""
    entries: dict[str, Mapping[str, Any]] = {}
    shared: dict[str, str] = {}
    for target in targets:
        if (chosen := forms.get(target.name)) is not None:
            own = {name: FORMS[chosen.form].entry(target, name, chosen.size) for name in target.linears}
            entries |= {name: entry for name, entry in own.items() if entry}
            shared |= dict.fromkeys(target.linears[1:], target.linears[0])
    return {"forms": entries, **({"shared_factors": shared} if shared else {})}


def embeddings_entry(structure: Structure, forms: Forms) -> dict[str, Any]:
    """The embeddings in few bits as ``config.json`` holds them: by module, bits and group size."""
    chosen = {target.name: forms[target.name] for target in structure.vocabulary if target.name in forms}
    own = {target.name for target in structure.vocabulary if is_own_module(target)}
    entries = {name: {"bits": bits_of(c), "group_size": c.size} for name, c in chosen.items() if name in own}
    return {"embeddings": entries} if entries else {}


def quantization_entry(structure: Structure, forms: Forms) -> dict[str, Any] | None:
    """The ``quantization_config`` of the linears in few bits; None without any."""
    groups: dict[tuple[int, int | None], list[str]] = {}
    for target in structure.stored:
        chosen = forms.get(target.name)
        if chosen is None or is_own_module(target):
            continue
        form = FORMS[chosen.form]
        if form.bits is not None:
            size = chosen.size if chosen.size in GROUP_SIZES else None
            groups.setdefault((form.bits, size), []).append(target.name)
        elif form.factor_bits is not None:
            for name in _packed_modules(target, form, chosen.size):
                scheme = (form.factor_bits, None)
                if f"{name}.".endswith(f".{BASE}") and form.base is not None and form.base.bits is not None:
                    scheme = (form.base.bits, group_size_of(target))
                groups.setdefault(scheme, []).append(name)
    return integer_config(groups) if groups else None


def _packed_modules(target: Target, form: Form, size: int) -> list[str]:
    """The modules that hold the packed parts of a target."""
    owners = {linear: form.shapes(target, linear, size) for linear in target.linears}
    parts = [f"{linear}.{leaf}" for linear, leaves in owners.items() for leaf in leaves]
    return [part.removesuffix(".weight_packed") for part in parts if part.endswith(".weight_packed")]


def without_bits(forms: Forms) -> dict[str, Chosen]:
    """The forms of the same model with all weights in the dtype of the source."""
    plain: dict[str, Chosen] = {}
    for name, chosen in forms.items():
        form = FORMS[chosen.form]
        if form.curve == "correction":
            continue
        if form.base is not None:
            plain[name] = Chosen(form.base.name, chosen.size)
        elif form.bits is None:
            plain[name] = chosen
    return plain
