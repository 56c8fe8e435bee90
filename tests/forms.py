"""Models with every form of a linear, and the dense models that compute the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from families import dense_weight, linear_targets, tiny_model
from svdllm.compression.math.packing import pack
from svdllm.models.low_rank import FORMAT_VERSION, family_classes, low_rank_config

# Of each family: the linears that make the inner features of an MLP, and the one that reads them.
MLPS: dict[str, tuple[tuple[str, ...], str]] = {
    "llama": (("gate_proj", "up_proj"), "down_proj"),
    "qwen2": (("gate_proj", "up_proj"), "down_proj"),
    "gemma3_text": (("gate_proj", "up_proj"), "down_proj"),
    "phi3": (("gate_up_proj",), "down_proj"),
    "gpt2": (("mlp.c_fc",), "mlp.c_proj"),
    "opt": (("fc1",), "fc2"),
    "gpt_neox": (("dense_h_to_4h",), "dense_4h_to_h"),
    "falcon": (("dense_h_to_4h",), "dense_4h_to_h"),
}


def model_in_forms(family: str, width: int = 30, **overrides: Any) -> tuple[Any, Any]:
    """A dense model, and one that computes the same with narrower MLPs and, outside of them, packed linears and pairs.

    For this the dense model is changed: the weights outside MLPs lose three of their ranks, and the last linear of an
    MLP reads ``width`` of its inner features only.
    """
    dense = tiny_model(family, **overrides)
    producers, consumer = MLPS[family]
    forms: dict[str, dict[str, Any]] = {}
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    targets = linear_targets(dense)
    inner = next(dense_weight(linear).shape[1] for name, linear in targets.items() if name.endswith(consumer))
    kept = torch.randperm(inner, generator=torch.Generator().manual_seed(7))[:width].sort().values
    for index, (name, linear) in enumerate(targets.items()):
        weight_OI = dense_weight(linear)
        transposed = isinstance(linear, Conv1D)
        if name.endswith(producers):
            rows = torch.cat([kept + inner * part for part in range(weight_OI.shape[0] // inner)])
            forms[name] = {"form": "narrow", "out_features": len(rows)}
            narrow_OI = weight_OI[rows]
            if f"{name}.bias" in state:
                state[f"{name}.bias"] = state[f"{name}.bias"][rows]
        elif name.endswith(consumer):
            forms[name] = {"form": "narrow", "in_features": width}
            narrow_OI = weight_OI[:, kept].clone()
            weight_OI.zero_()
            weight_OI[:, kept] = narrow_OI
        else:
            forms[name] = _factorise(state, name, weight_OI, index)
            continue
        state[f"{name}.weight"] = narrow_OI.T.contiguous() if transposed else narrow_OI
    settings = {"format_version": FORMAT_VERSION, "base_model_type": dense.config.model_type, "forms": forms}
    model = family_classes(dense.config.model_type).causal_lm(low_rank_config(dense.config, settings))
    model.load_state_dict(state, strict=True)
    return dense, model.eval()


def _factorise(state: dict[str, Tensor], name: str, weight_OI: Tensor, index: int) -> dict[str, Any]:
    """Truncates a weight in place, puts its factors into the state, and returns the entry of its form."""
    rank, side = min(weight_OI.shape) - 3, "columns" if index % 2 else "rows"
    left, values, right = torch.linalg.svd(weight_OI.double(), full_matrices=False)
    u_OR, v_RI = (left * values)[:, :rank], right[:rank]
    weight_OI.copy_(u_OR @ v_RI)
    del state[f"{name}.weight"]
    bias = state.pop(f"{name}.bias", None)
    if index % 4 == 3:
        state |= {f"{name}.svd_v.weight": v_RI, f"{name}.svd_u.weight": u_OR}
        state |= {} if bias is None else {f"{name}.svd_u.bias": bias}
        return {"form": "pair", "rank": rank}
    packed = pack(u_OR, v_RI, side)
    state |= {f"{name}.svd_v.weight": packed.svd_v, f"{name}.svd_u.weight": packed.svd_u, f"{name}.order": packed.order}
    state |= {} if bias is None else {f"{name}.bias": bias}
    return {"form": "packed", "rank": rank, "side": side}
