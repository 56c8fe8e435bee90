"""Makes models keep latents ``V x``, as wide as the rank, in the key-value cache instead of ``U V x``."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from svdllm.common.errors import InputError, UnsupportedModelError
from svdllm.inference.cache_names import CACHE_NAMES, cache_name, cache_of
from svdllm.inference.latent_attention import LatentAttention
from svdllm.inference.latent_keys import Positions, Seen, find_key_path, rotary_modules, watched
from svdllm.inference.packed import is_factored, out_features_of, rank_of
from svdllm.models.limits import text_config
from svdllm.models.logits import compare_logits, full_precision
from svdllm.models.low_rank.info import LowRankInfo


class CacheSize(NamedTuple):
    """Bytes per token in the caches of all layers."""

    ordinary: int
    latent: int


def use_latent_cache(model: Any, *, keys: bool = True) -> int:
    """Makes a model keep latents in its key-value cache, in place. Returns the number of changed layers.

    Keys or values are kept as latents if their projection is factorised at a rank below its width, else unchanged. If
    both share one first factor (``joint_kv`` of a recipe), its latent is kept once. Caches and attention
    implementations stay those of transformers. Logits differ from those with the ordinary cache by rounding only, which
    is checked on a few tokens. A cache that was filled before cannot be used afterwards. Call this after
    ``fuse_factors``.

    Rotated keys are rebuilt at every step for all slots of the cache; values are not. ``keys=False`` keeps keys
    unchanged, which saves less memory and costs little time.

    Raises:
        InputError: the model is in training mode.
        UnsupportedModelError: a layer makes its keys or values in an unknown way; the message names its class and the
            way. The model is not changed.
    """
    if model.training:
        raise InputError("A latent cache is for inference, and the model is in training mode: call model.eval() first.")
    layers = _layers_to_change(model, keys)
    if not layers:
        return 0
    with torch.no_grad(), full_precision():
        with watched(layers) as seen:
            expected = _trial(model)
        changed = _latent_attentions(model, layers, seen, keys)
        for attention in changed:
            attention.install()
        found = _trial(model)

    def refusal(how: str) -> UnsupportedModelError:
        use_ordinary_cache(model)
        classes = ", ".join(sorted({type(layer).__name__ for layer in layers.values()}))
        return UnsupportedModelError(
            f"The cache of {classes} cannot hold latents: {how}. These layers do something with keys or values that is "
            "not known here. Use the ordinary cache."
        )

    compare_logits(found, expected, refusal)
    return len(changed)


def use_ordinary_cache(model: nn.Module) -> int:
    """Undoes ``use_latent_cache``. Returns the number of changed layers."""
    changed: list[Any] = [module.latent_attention for module in model.modules() if hasattr(module, "latent_attention")]
    for attention in changed:
        attention.remove()
    return len(changed)


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values, or latents, in a cache of transformers; empty slots of a static cache count too."""
    tensors = [part for layer in cache.layers for part in (layer.keys, layer.values) if part is not None]
    return sum(part.numel() * part.element_size() for part in tensors)


def cache_size(config: Any, dtype: torch.dtype | None = None) -> CacheSize:
    """Computes from a config what a token takes in the cache.

    These are ``layers * 2 * kv_dim`` elements, or the sum of ``min(rank, kv_dim)`` for latents, where a rank that keys
    and values share counts once. Whether the layers can keep latents is not checked. ``dtype`` is the config's by
    default.
    """
    text = text_config(config)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    info = LowRankInfo.of(config)
    ranks, shared = (info.ranks, info.shared_factors) if info else ({}, {})
    latents = {name: rank for name, rank in ranks.items() if name.endswith((".k_proj", ".v_proj"))}
    kept = [
        min(rank, width * (2 if name in shared.values() else 1)) for name, rank in latents.items() if name not in shared
    ]
    elements = 2 * text.num_hidden_layers * width
    size = (dtype or config.dtype or torch.float32).itemsize
    return CacheSize(elements * size, (elements - len(latents) * width + sum(kept)) * size)


def _layers_to_change(model: nn.Module, keys: bool) -> dict[str, Any]:
    """Finds the attention layers with a projection whose latent is smaller than its output."""
    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if {"k_proj", "v_proj"} <= set(module._modules)}
    if not layers and (factored := [name for name, module in modules.items() if is_factored(module)]):
        owners = sorted({type(modules[name.rpartition(".")[0]]).__name__ for name in factored})
        raise UnsupportedModelError(
            f"No layer of {type(model).__name__} has a k_proj and a v_proj (its factorised linears are in "
            f"{', '.join(owners)}): keys and values can be cached as latents only if they have projections of their "
            "own. Use the ordinary cache."
        )
    return {
        name: layer
        for name, layer in layers.items()
        if not hasattr(layer, "latent_attention")
        and ((keys and (_is_narrow(layer.k_proj) or _is_joint(layer))) or _is_narrow(layer.v_proj))
    }


def _is_narrow(linear: Any) -> bool:
    return is_factored(linear) and rank_of(linear) < out_features_of(linear)


def _is_joint(layer: Any) -> bool:
    """Whether keys and values share a latent that is smaller than both."""
    return (
        is_factored(layer.k_proj)
        and getattr(layer.v_proj, "svd_v", None) is layer.k_proj.svd_v
        and rank_of(layer.k_proj) < out_features_of(layer.k_proj) + out_features_of(layer.v_proj)
    )


def _latent_attentions(model: Any, layers: dict[str, Any], seen: dict[str, Seen], keys: bool) -> list[LatentAttention]:
    positions = rotary_modules(model, sorted(set(getattr(model.config, "layer_types", None) or [])))
    return [_latent_attention(name, layer, seen[name], positions, keys) for name, layer in layers.items()]


def _latent_attention(name: str, layer: Any, seen: Seen, positions: list[Positions], keys: bool) -> LatentAttention:
    def refused(why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{type(layer).__name__} ({name}) cannot keep latents in its cache: {why}. Use the ordinary cache."
        )

    module = sys.modules[type(layer).__module__]
    if not (hasattr(module, "ALL_ATTENTION_FUNCTIONS") and hasattr(module, "eager_attention_forward")):
        raise refused("it does not call the attention functions of transformers")
    if seen.keys is None or seen.values is None:
        raise refused(f"it does not hand its keys and values to a cache that it takes as {' or '.join(CACHE_NAMES)}")
    joint = keys and _is_joint(layer)
    latent_values = joint or _is_narrow(layer.v_proj)
    if latent_values and not torch.equal(seen.values.transpose(1, 2).flatten(-2), seen.projected["v_proj"]):
        raise refused("its values are not what v_proj gives")
    path = None
    if joint or (keys and _is_narrow(layer.k_proj)):
        path = find_key_path(layer, seen, positions)
        if path is None:
            raise refused("its keys are not what k_proj gives, nor that with a norm and a rotation that are known here")
        if path.positions is not None and path.positions.change_with_length:
            raise refused(f"its angles change with the length of the text (rope_type {path.positions.kind})")
    return LatentAttention(layer, seen.keys.shape[1], path, latent_values)


def _trial(model: Any) -> Tensor:
    """Computes logits (2, 7, vocabulary) of a few tokens: five at once, then two one by one."""
    embeddings = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embeddings.num_embeddings, (2, 7), generator=generator).to(embeddings.weight.device)
    outputs = [model(input_ids=ids[:, :5], use_cache=True)]
    cache = {cache_name(model): cache_of(outputs[0])}
    for slot in (5, 6):
        outputs.append(model(input_ids=ids[:, slot : slot + 1], **cache, use_cache=True))
    return torch.cat([output.logits for output in outputs], dim=1)
